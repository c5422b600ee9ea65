"""Runs runs: several side by side, each in a process of its own, until all are done or the time is up."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from openmythos.lab.experiment import Run
from openmythos.lab.store import Store
from openmythos.lab.worker import Order, Ticked, serve


class Job(NamedTuple):
    """A run of an experiment."""

    experiment: str
    run: Run

    def __str__(self) -> str:
        return f"{self.experiment}/{self.run.key}"


@dataclass
class Report:
    """What came of the jobs: seconds of those done, messages of those that failed, and those not begun."""

    done: list[tuple[Job, float]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[Job] = field(default_factory=list)


class _Worker:
    """A process and this end of its pipe."""

    def __init__(self, store: Store) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads in any state
        self.connection: Connection
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, store.models), daemon=True)
        self.process.start()
        there.close()  # so that its death is an end of file here
        self.job: Job | None = None
        self.share = 0.0

    def begin(self, job: Job, store: Store) -> None:
        self.job, self.share = job, 0.0
        self.connection.send(Order(job.run, store.path(job.experiment, job.run)))

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def execute(
    jobs: Sequence[Job],
    store: Store,
    workers: int = 2,
    seconds: float | None = None,
    watch: Callable[[float, list[str]], None] | None = None,
) -> Report:
    """Computes every job whose result the store lacks.

    Args:
        jobs: in the order in which they begin.
        workers: processes side by side, one thread each.
        seconds: none begins that would last beyond, by the longest so far of its experiment; None: no limit. One that
            has begun is finished.
        watch: (jobs done, parts of those in progress included; names of those in progress), called now and then.

    Returns:
        What was done here. Results are in the store. A job that raised or whose process died has failed; the others go
        on.
    """
    report, began = Report(), time.monotonic()
    waiting = [job for job in jobs if store.result(job.experiment, job.run) is None]
    crew: list[_Worker] = []
    try:
        while True:
            for worker in [one for one in crew if one.job is None]:
                if (job := _next(waiting, report, began, seconds)) is None:
                    break
                worker.begin(job, store)
            while len(crew) < workers and (job := _next(waiting, report, began, seconds)) is not None:
                crew.append(_Worker(store))
                crew[-1].begin(job, store)
            busy = [one for one in crew if one.job is not None]
            if not busy:
                break
            ready: Any = wait([one.connection for one in busy], timeout=1.0)
            for worker in [one for one in busy if one.connection in ready]:
                if not _listen(worker, report):
                    crew.remove(worker)
            if watch is not None:
                going = [one for one in crew if one.job is not None]
                ended = len(report.done) + len(report.failed)
                watch(ended + sum(one.share for one in going), [str(one.job) for one in going])
    finally:
        for worker in crew:
            worker.end()
    report.left = waiting
    return report


def _next(waiting: list[Job], report: Report, began: float, seconds: float | None) -> Job | None:
    """Takes the first job off `waiting` that fits the time."""
    for job in waiting:
        known = [took for done, took in report.done if done.experiment == job.experiment]
        if seconds is None or time.monotonic() - began + max(known, default=0.0) < seconds:
            waiting.remove(job)
            return job
    return None


def _listen(worker: _Worker, report: Report) -> bool:
    """Takes a word of a busy worker; False if it died."""
    job = worker.job
    assert job is not None
    try:
        word = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.end()
        report.failed[str(job)] = f"its process ended with code {worker.process.exitcode}"
        return False
    if isinstance(word, Ticked):
        worker.share = word.share
        return True
    worker.job = None
    if word.error:
        report.failed[str(job)] = word.error
    else:
        report.done.append((job, word.seconds))
    return True
