"""Configurations measured on the GPU at hand: a file of choices, and the measurements that fill it.

Only `python -m openmythos_kernels tune` measures. Launches ask `chosen` before they look into their tables. The file is
`tuning.json` in the cache folder: device name -> what is configured -> numbers. An unreadable file counts as empty.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openmythos_kernels.runtime import cache, target

_trying: dict[str, tuple[int, ...]] = {}


@dataclass(frozen=True)
class Job:
    """What to tune: its name for `chosen`, the candidates, and a call that uses the chosen one."""

    what: str
    candidates: Sequence[tuple[int, ...]]
    call: Callable[[], object]


def path() -> Path:
    """The file of choices."""
    return cache.folder() / "tuning.json"


def device() -> str:
    """The GPU's name in the file; empty without a GPU, or when compiling for another (`target.targeting`)."""
    if target.overridden() or not torch.cuda.is_available():
        return ""
    return torch.cuda.get_device_name()


def chosen(what: str) -> tuple[int, ...] | None:
    """The configuration that was fastest on this device, or None."""
    if what in _trying:
        return _trying[what]
    name = device()
    return _choices().get(name, {}).get(what) if name else None


@functools.cache
def _choices() -> dict[str, dict[str, tuple[int, ...]]]:
    try:
        stored = json.loads(path().read_text())
        return {name: {what: tuple(map(int, v)) for what, v in found.items()} for name, found in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def store(name: str, what: str, config: Sequence[int]) -> None:
    """Adds a choice to the file, atomically: readers see the old file or the new one."""
    _choices.cache_clear()
    choices = {known: dict(found) for known, found in _choices().items()}
    choices.setdefault(name, {})[what] = tuple(config)
    path().parent.mkdir(parents=True, exist_ok=True)
    fresh = path().with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(choices, indent=1))
    fresh.replace(path())
    _choices.cache_clear()


@contextlib.contextmanager
def trying(what: str, config: Sequence[int]) -> Iterator[None]:
    """Within the context, `chosen(what)` is this configuration."""
    before = _trying.get(what)
    _trying[what] = tuple(config)
    try:
        yield
    finally:
        if before is None:
            del _trying[what]
        else:
            _trying[what] = before


def tune(
    jobs: Sequence[Job],
    seconds: float,
    *,
    name: str,
    measure: Callable[[Callable[[], object]], float],
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> dict[str, tuple[int, ...]]:
    """Measures every candidate of every job and stores the fastest, job by job, until the time is up.

    A candidate that does not run (too much shared memory, say) is skipped; one that breaks the device ends the tuning.
    A job that the time limit interrupts stores nothing.

    Args:
        jobs: what to tune.
        seconds: time limit, by `clock`.
        name: the device's, from `device`.
        measure: returns the seconds that one call takes.
        say: receives one line of progress per job.

    Returns:
        The choices stored: what is configured -> numbers.
    """
    end = clock() + seconds
    found: dict[Any, tuple[int, ...]] = {}
    for number, job in enumerate(jobs, 1):
        times: dict[tuple[int, ...], float] = {}
        for config in job.candidates:
            if clock() >= end:
                say(f"time is up: {len(found)} of {len(jobs)} tuned, the rest keep their tables' configurations")
                return found
            with trying(job.what, config):
                try:
                    times[tuple(config)] = measure(job.call)
                except torch.AcceleratorError as error:
                    say(f"{job.what} {tuple(config)} broke the device; start a new process: {error}")
                    return found
                except Exception as error:  # compilers raise errors of many types
                    say(f"  {job.what} {tuple(config)}: {type(error).__name__}")
        if times:
            best = min(times, key=times.__getitem__)
            found[job.what] = best
            store(name, job.what, best)
            slowest = max(times.values())
            say(
                f"[{number}/{len(jobs)}] {job.what}: {best}, {times[best] * 1e6:.0f} us, "
                f"the slowest {slowest * 1e6:.0f} us"
            )
    return found


def median_seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the current GPU, in a CUDA graph, so that Python leaves no gaps between launches."""
    each, repeats = 5, 10
    for _ in range(2):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(each):
            call()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / each)
    return sorted(times[1:])[repeats // 2]
