"""A random order of any length that is computed where it is needed, and never stored."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def shuffled(places: np.ndarray, length: int, *key: int) -> np.ndarray:
    """What a permutation of 0 .. length - 1, chosen by `key`, has at the given places.

    A Feistel network permutes the numbers of an even count of bits; what falls beyond `length` goes through it again
    (Black and Rogaway, 2002). That is at most four times on average.

    Args:
        places: (n,) of integers in 0 .. length - 1.
        length: at most 2^62.
        key: integers >= 0.

    Returns:
        (n,) uint64.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = _feistel(places.astype(np.uint64), half, keys)
    while (beyond := values >= np.uint64(length)).any():
        values[beyond] = _feistel(values[beyond], half, keys)
    return values


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values >> half, values & ((np.uint64(1) << half) - np.uint64(1))
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half))
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
