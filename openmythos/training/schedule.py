"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "constant", "wsd"]


def learning_rate(
    step: int, steps: int, peak: float, warmup: int, floor: float, shape: Shape = "cosine", decay: float = 0.2
) -> float:
    """Linear warm-up to `peak`, then what `shape` says, down to `floor * peak`.

    Args:
        step: counted from 0.
        steps: length of the run; the last step and any after it are at the floor (but for "constant").
        peak: the rate at step `warmup`.
        warmup: number of steps before the peak, the first at `peak / (warmup + 1)`.
        floor: the final rate, as a fraction of the peak.
        shape: "cosine": half a cosine. "constant": the peak until the end. "wsd" (warm-up,
            stable, decay): the peak, then a line down to the floor.
        decay: the share of the steps, at the end of the run, in which "wsd" decays.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if shape == "constant":
        return peak
    begin = warmup if shape == "cosine" else max(warmup, steps - 1 - decay * steps)
    done = min(max(step - begin, 0.0) / max(steps - 1 - begin, 1), 1.0)
    left = 1 - done if shape == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * (floor + (1 - floor) * left)
