"""Measurements in separate processes.

On a CPU, the cost of a large temporary depends on the history of the process: memory that malloc has returned to the
system costs page faults when it is allocated again, memory that malloc has kept does not, and the sizes freed so far
decide which. This changes open-mythos' times by up to a factor of four, so a row would depend on the rows before it.
A row that is measured in a fresh process depends only on its own work.
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
    """Runs `measure(session, *arguments)` in a new process and returns its result, which must be plain values.

    The session that `measure` gets has an empty text and shows no progress.

    Raises:
        RuntimeError: the process was killed. Whatever `measure` raises is raised here too.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, replace(session, text=session.text[:0]), *arguments).result()
