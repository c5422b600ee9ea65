"""Trains a small model on text with the reference and with the fast modules, and compares the losses.

A third run is the control: the reference, started from weights one unit in the last place away. Training is chaotic:
as soon as two experts of a token are nearly tied, the last bit decides between them, and the losses diverge. The
control shows how far a single rounding error grows, while ours rounds differently in every step.
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
    """The contender with every weight replaced by the next larger float."""
    for p in contender.model.parameters():
        p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return contender


def difference(curves: dict[str, list[float]], name: str = "ours") -> list[float]:
    """Absolute difference between a contender's loss and the reference's, step by step."""
    return [abs(a - b) for a, b in zip(curves["reference"], curves[name])]
