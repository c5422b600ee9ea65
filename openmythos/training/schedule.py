"""The learning-rate schedule."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor * peak`.

    Args:
        step: counted from 0.
        steps: length of the run; the last step and any after it are at the floor.
        peak: the rate at step `warmup`.
        warmup: number of steps before the peak, the first at `peak / (warmup + 1)`.
        floor: the final rate, as a fraction of the peak.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
