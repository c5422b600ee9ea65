"""Sampling that is fair between contenders, and the few statistics taken from it.

A machine's speed drifts (clocks, neighbours, memory). So contenders are run in
turn, round after round, and compared inside each round; a figure is the
median over rounds, shown with its range. Single times are never reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass
class Lap:
    """One contender's turn: `run` is timed, `reset` brings its state back afterwards, untimed."""

    run: Callable[[], object]
    reset: Callable[[], object] | None = None


class Clock:
    """Seconds that a call takes: wall time on a CPU, device events on a GPU."""

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
    """Times every contender once a round, each round beginning with another one.

    Args:
        least, most: rounds; between them sampling stops once `budget_s` seconds have passed.
        warmup: rounds run before, untimed.
        tick: called after every turn, for progress.

    Returns:
        contender -> seconds, one sample a round; samples of equal index were taken side by side.
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
    """Median and range."""
    return {"median": median(values), "low": min(values), "high": max(values), "n": len(values)}


def speedup(slow: list[float], fast: list[float]) -> dict:
    """How many times faster `fast` is: the ratio in each round, then its median and range."""
    return spread([a / b for a, b in zip(slow, fast)])
