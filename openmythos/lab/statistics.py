"""Statistics of a few seeds: all of them are shown, none is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Several seeds in one line.

    Attributes:
        median, low, high: the median, the least and the largest value.
        coverage: the probability that low .. high contains the median of all possible seeds, 1 - 2^(1 - n): every seed
            falls below or above that median like a fair coin.
    """

    median: float
    low: float
    high: float
    coverage: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def summary(values: Sequence[float]) -> Summary:
    """
    Raises:
        ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("values: got none, must be at least one")
    found = np.asarray(values, dtype=float)
    return Summary(float(np.median(found)), float(found.min()), float(found.max()), 1 - 2.0 ** (1 - len(found)))


def bootstrap(
    statistic: Callable[..., float], *samples: Sequence, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of a statistic, from samples drawn again with replacement.

    Args:
        statistic: (arrays, one for each sample) -> number. Draws for which it is not finite are left out.
        samples: each (n, ...); the entries of its first dimension are drawn.
        level: share of the draws inside the interval.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: a sample is empty, or no draw gave a finite number.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    if not arrays or not all(len(array) for array in arrays):
        raise ValueError("samples: must be at least one, none empty")
    rng = np.random.default_rng(seed)
    found = np.array(
        [statistic(*(array[rng.integers(len(array), size=len(array))] for array in arrays)) for _ in range(draws)]
    )
    found = found[np.isfinite(found)]
    if not len(found):
        raise ValueError("statistic: finite for no draw")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The rank correlation of paired values, ties sharing their mean rank; None where x or y is constant.

    Raises:
        ValueError: x and y differ in length.
    """
    if len(x) != len(y):
        raise ValueError(f"x, y: {len(x)} and {len(y)} values, must be equally many")
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.reshape(-1)]


def seeds_said(n: int) -> str:
    """A number of seeds in words."""
    return "1 seed" if n == 1 else f"{n} seeds"
