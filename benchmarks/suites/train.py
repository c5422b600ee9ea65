"""A small model trained on real text twice, with the reference and with the fast modules: do the losses agree?"""

from __future__ import annotations

from benchmarks.contenders import build
from benchmarks.models import SMALL
from benchmarks.session import Session
from benchmarks.timing import Lap, interleave, speedup

STEPS, QUICK_STEPS = 240, 40
BATCH, TOKENS, LOOPS = 8, 96, 4
LEARNING_RATE = 1e-3


def run(session: Session) -> dict:
    steps = QUICK_STEPS if session.quick else STEPS
    pair, _ = build(SMALL, ("reference", "ours"), session.device)
    data = session.batches(BATCH, TOKENS)
    runs = {name: c.training(data, LOOPS, steps, lr=LEARNING_RATE) for name, c in pair.items()}
    curves: dict[str, list] = {name: [] for name in pair}

    def lap(name: str) -> Lap:
        return Lap(lambda: curves[name].append(next(runs[name]).loss))

    with session.progress.stage(f"train: {steps} steps, reference and ours in turn", 2 * steps) as tick:
        laps = {name: lap(name) for name in pair}
        samples = interleave(laps, session.clock, steps, steps, 0, warmup=0, tick=tick)
    return {
        "model": SMALL,
        "batch": [BATCH, TOKENS],
        "loops": LOOPS,
        "learning_rate": LEARNING_RATE,
        "corpus": session.corpus,
        "losses": curves,
        "difference": difference(curves),
        "seconds": samples,
        "speedup": speedup(samples["reference"], samples["ours"]),
        "ours": pair["ours"].note,
        "requirements": [],
    }


def difference(curves: dict[str, list[float]]) -> list[float]:
    """Step by step, how far the two losses are apart."""
    return [abs(a - b) for a, b in zip(curves["reference"], curves["ours"])]
