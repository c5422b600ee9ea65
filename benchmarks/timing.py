"""Sampling that is fair to all contenders, and the statistics of the samples.

The speed of a machine drifts (clocks, other processes, memory). Contenders therefore run in turn, round after round,
and are compared within each round. A figure is the median over rounds with its range, never a single time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Lap:
    """One contender's turn: `run` is timed; `reset` then restores its state, untimed."""

    run: Callable[[], object]
    reset: Callable[[], object] | None = None


class Clock:
    """Measures the seconds of a call: wall time on a CPU, device events on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def interleave(
    laps: dict[str, Lap],
    clock: Callable[[Callable[[], object]], float],
    least: int,
    most: int,
    budget_s: float,
    warmup: int = 1,
    tick: Callable[[], object] = lambda: None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Times every contender once per round; each round starts with another contender.

    Args:
        least, most: number of rounds. After `least` rounds, sampling stops once `budget_s` seconds have passed.
        warmup: untimed rounds before the first.
        tick: called after every turn, for progress.

    Returns:
        contender -> seconds, one sample per round; samples with the same index come from the same round.
    """
    names = list(laps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = now()
    for round_ in range(-warmup, most):
        if round_ >= least and now() - start > budget_s:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            lap = laps[name]
            seconds = clock(lap.run)
            if lap.reset is not None:
                lap.reset()
            if round_ >= 0:
                samples[name].append(seconds)
            tick()
    return samples


def spread(values: list[float]) -> dict:
    """Median, range and number of values."""
    return {"median": median(values), "low": min(values), "high": max(values), "n": len(values)}


def without_gradients(call: Callable[[], T]) -> Callable[[], T]:
    """The call under `torch.no_grad`."""

    def quiet() -> T:
        with torch.no_grad():
            return call()

    return quiet


def speedup(slow: list[float], fast: list[float]) -> dict:
    """How many times faster `fast` is: median and range of the ratio in each round."""
    return spread([a / b for a, b in zip(slow, fast)])
