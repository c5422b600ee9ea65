"""A process that computes runs, one after the other, with one thread."""

from __future__ import annotations

import os
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from openmythos.lab.experiment import Run
from openmythos.lab.machine import versions
from openmythos.lab.store import save
from openmythos.lab.text import KEPT


class Order(NamedTuple):
    """What a worker gets: the run, and the file for its result."""

    run: Run
    path: Path


class Ticked(NamedTuple):
    """A worker's word: how far its run is, 0 to 1."""

    share: float


class Ended(NamedTuple):
    """A worker's last word of a run: its seconds, and what went wrong, if anything did."""

    seconds: float
    error: str = ""


TICK_SECONDS = 0.5  # between two words of a worker at least


def serve(connection: Connection, models: Path) -> None:
    """Computes the orders that come, until the connection closes; `models` is where they keep models for each other."""
    os.environ.setdefault(KEPT, str(models))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    torch.set_num_threads(1)
    with_what = versions()
    while True:
        try:
            run, path = connection.recv()
        except EOFError:
            return
        began = last = time.perf_counter()

        def tick(done: int, of: int) -> None:
            nonlocal last
            if time.perf_counter() - last >= TICK_SECONDS:
                last = time.perf_counter()
                connection.send(Ticked(done / max(of, 1)))  # fails where the parent was killed, which ends the run

        try:
            torch.manual_seed(0)  # a run that forgot to seed is then at least the same in every worker
            found = run.compute(run.settings, tick)
            seconds = time.perf_counter() - began
            save(path, run, found, seconds, with_what)
        except BrokenPipeError:
            return
        except Exception:
            connection.send(Ended(time.perf_counter() - began, traceback.format_exc()))
        else:
            connection.send(Ended(seconds))
