"""A small model trained on real text twice, with the reference and with the fast modules: do the losses agree?

A third training is the control: the reference again, its weights one unit in the last place away. Training is chaotic:
    once
a token's routing is a near-tie, the last bit decides its expert, and the losses part. The control shows what one
rounding, before the first step, grows to; ours rounds for itself in every step.
"""

from __future__ import annotations

import torch

from benchmarks.contenders import Contender, build
from benchmarks.models import SMALL
from benchmarks.session import Session
from benchmarks.timing import Lap, interleave, speedup

STEPS, QUICK_STEPS = 160, 40
BATCH, TOKENS, LOOPS = 8, 96, 4
LEARNING_RATE = 1e-3
TIMED = ("reference", "ours")


def run(session: Session) -> dict:
    steps = QUICK_STEPS if session.quick else STEPS
    trained, _ = build(SMALL, TIMED, session.device)
    trained["control"] = nudged(build(SMALL, ("reference",), session.device)[0]["reference"])
    data = session.batches(BATCH, TOKENS)
    runs = {name: c.training(data, LOOPS, steps, lr=LEARNING_RATE) for name, c in trained.items()}
    curves: dict[str, list] = {name: [] for name in trained}

    def lap(name: str) -> Lap:
        return Lap(lambda: curves[name].append(next(runs[name]).loss))

    with session.progress.stage(f"train: {steps} steps, reference, ours and a control in turn", 3 * steps) as tick:
        laps = {name: lap(name) for name in trained}
        samples = interleave(laps, session.clock, steps, steps, 0, warmup=0, tick=tick)
    return {
        "model": SMALL,
        "batch": [BATCH, TOKENS],
        "loops": LOOPS,
        "learning_rate": LEARNING_RATE,
        "corpus": session.corpus,
        "losses": curves,
        "difference": difference(curves, "ours"),
        "control": difference(curves, "control"),
        "seconds": {name: samples[name] for name in TIMED},
        "speedup": speedup(samples["reference"], samples["ours"]),
        "ours": trained["ours"].note,
        "requirements": [],
    }


@torch.no_grad()
def nudged(contender: Contender) -> Contender:
    """The contender with every weight moved to the next float above it."""
    for p in contender.model.parameters():
        p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return contender


def difference(curves: dict[str, list[float]], name: str = "ours") -> list[float]:
    """Step by step, how far a contender's loss is from the reference's."""
    return [abs(a - b) for a, b in zip(curves["reference"], curves[name])]
