"""How many loops a training step runs: fixed, or drawn anew for each batch or each sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from openmythos.config import checked_integer


@dataclass(frozen=True)
class DepthConfig:
    """How many loops a training step runs. Evaluation runs `mean` loops, rounded.

    With every distribution the draws have this mean, up to what `max` cuts off.

    Attributes:
        sampling: distribution of the number of loops. fixed: `mean`. uniform: 1 to 2 * mean - 1. poisson: 1 plus a
            Poisson variable. lognormal_poisson: the same with a Poisson rate that is log-normal, which has a heavier
            tail (Huginn, arXiv 2502.05171).
        mean: mean number of loops.
        sigma: standard deviation of the log of the rate, for lognormal_poisson.
        max: largest number of loops; what exceeds it becomes it.
        per: what gets a draw of its own. With sequence, every sequence of a batch runs its own number of loops.
        grad_loops: truncated backpropagation, loops with gradients, counted from each sequence's end. half: half of
            the mean, rounded up. all: no truncation.
        curriculum_steps: steps over which the mean grows linearly from 1 to `mean`; 0: it is `mean` at once.
    """

    sampling: Literal["fixed", "uniform", "poisson", "lognormal_poisson"] = "fixed"
    mean: float = 4.0
    sigma: float = 0.5
    max: int = 64
    per: Literal["batch", "sequence"] = "sequence"
    grad_loops: int | Literal["half", "all"] = "all"
    curriculum_steps: int = 0

    def __post_init__(self) -> None:
        checked_integer("depth.max", self.max, 1)
        checked_integer("depth.curriculum_steps", self.curriculum_steps, 0)
        if not 1 <= self.mean <= self.max:
            raise ValueError(f"depth.mean = {self.mean}: must be in 1 .. depth.max = {self.max}")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"depth.sigma = {self.sigma}: must be >= 0 and finite")
        if self.sampling in ("fixed", "uniform") and self.mean != int(self.mean):
            raise ValueError(f'depth.mean = {self.mean}: must be an integer with depth.sampling = "{self.sampling}"')
        if self.grad_loops not in ("half", "all"):
            checked_integer("depth.grad_loops", self.grad_loops, 1)

    @property
    def gradient_loops(self) -> int | None:
        """Loops with gradients at most; None: all."""
        if self.grad_loops == "all":
            return None
        return math.ceil(self.mean / 2) if self.grad_loops == "half" else int(self.grad_loops)

    @property
    def evaluation_loops(self) -> int:
        return round(self.mean)


def draw_depths(depth: DepthConfig, step: int, sequences: int, seed: int = 0) -> list[int]:
    """The loops of each of a step's sequences: a function of its arguments alone, the same on every rank.

    Args:
        step: counted from 0.
        sequences: those of the whole batch, over all ranks.

    Raises:
        ValueError: step or seed below 0, or sequences below 1.
    """
    checked_integer("step", step, 0)
    checked_integer("sequences", sequences, 1)
    checked_integer("seed", seed, 0)
    rng = np.random.default_rng((seed, step, _STREAM))
    draws = sequences if depth.per == "sequence" else 1
    mean = depth.mean
    if step < depth.curriculum_steps:
        mean = 1 + (depth.mean - 1) * (step + 1) / (depth.curriculum_steps + 1)
    if depth.sampling == "fixed":
        loops = np.full(draws, round(mean))
    elif depth.sampling == "uniform":
        loops = rng.integers(1, 2 * round(mean), size=draws)
    else:
        rate = np.full(draws, mean - 1)
        if depth.sampling == "lognormal_poisson":  # the exponential has mean 1
            rate = rate * np.exp(depth.sigma * rng.standard_normal(draws) - depth.sigma**2 / 2)
        loops = 1 + rng.poisson(rate)
    found = [int(n) for n in np.minimum(loops, depth.max)]
    return found * sequences if depth.per == "batch" else found


# Keeps the draws apart from others that are seeded by (seed, step).
_STREAM = 0x6C6F6F70
