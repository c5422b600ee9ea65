"""Medians, intervals and rank correlations, against figures known otherwise."""

import numpy as np
import pytest

from openmythos.lab.statistics import bootstrap, spearman, summary


def test_summary():
    found = summary([3.0, 1.0, 2.0, 10.0, 4.0])
    assert found == (3.0, 1.0, 10.0, 1 - 2**-4) and str(found) == "3.000 (1.000 to 10.000)"
    assert summary([2.0]).coverage == 0
    with pytest.raises(ValueError, match="values: got none"):
        summary([])


def test_the_range_contains_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [found.low <= 0 <= found.high for found in (summary(rng.standard_normal(3)) for _ in range(4000))]
    assert np.mean(inside) == pytest.approx(summary([1, 2, 3]).coverage, abs=0.02)


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 26]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: r = 4.5 / sqrt(4.5 * 5).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="3 and 2 values"):
        spearman([1, 2, 3], [1, 2])


def test_bootstrap():
    rng = np.random.default_rng(1)
    sample = rng.normal(5, 1, size=400)
    low, high = bootstrap(np.mean, sample)
    assert low < sample.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.1)
    assert bootstrap(np.mean, sample) == (low, high) != bootstrap(np.mean, sample, seed=1)
    pairs = np.stack([np.arange(20.0), 2 * np.arange(20.0)], axis=1)
    slope = lambda rows: np.polyfit(rows[:, 0], rows[:, 1], 1)[0]  # noqa: E731
    assert bootstrap(slope, pairs) == pytest.approx((2, 2))
    ratio = lambda a, b: a.mean() / b.mean()  # noqa: E731
    low, high = bootstrap(ratio, sample, sample / 2)
    assert low < 2 < high
    for bad in ([], [[]]):
        with pytest.raises(ValueError, match="samples"):
            bootstrap(np.mean, *bad)
