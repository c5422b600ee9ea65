"""Measurements in processes of their own.

What a large temporary costs on a CPU depends on what the process did before: memory that malloc has given back to the
system comes back as page faults, memory that it has kept does not, and which of the two happens is decided by the sizes
freed so far. It moves open-mythos' times by up to a factor of four, so that a row would depend on the rows before it.
A row measured in a new process, which does nothing else and shows no progress, depends on its own work alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import TypeVar

from benchmarks.session import Session

T = TypeVar("T")


def apart(measure: Callable[..., T], session: Session, *arguments) -> T:
    """`measure(session, *arguments)` in a new process; it gets no text, shows no progress, and returns plain values.

    Raises:
        what `measure` raises. RuntimeError: its process was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, replace(session, text=session.text[:0]), *arguments).result()
