"""The learning rate over a run."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor * peak`.

    Args:
        step: counted from 0.
        steps: length of the run; its last step (and any after it) is at the floor.
        peak: reached at step `warmup`.
        warmup: steps below the peak, the first of them at `peak / (warmup + 1)`.
        floor: a fraction of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
