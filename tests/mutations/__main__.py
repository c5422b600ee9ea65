"""`python -m tests.mutations`: seeds small faults, one at a time, in a copy of the repository; tests should catch them.

A selection of tests must first pass without a fault; otherwise "caught" would mean nothing.
Exits with 1 if a fault is missed or not run, or a list is out of date. The verdicts are kept in docs/mutations.csv.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.kit import cpp_build
from tests.mutations.mutation import ROOT, Mutation, families
from tests.mutations.record import Record
from tests.mutations.scratch import Scratch

SECONDS = 600  # for one selection; a fault that makes the tests hang is caught


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="families, or else parts of faults' names")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    parser.add_argument("--jobs", type=int, default=1, help="faults at once, each in a copy of its own (default: 1)")
    parser.add_argument(
        "--resume", action="store_true", help="leave out faults whose file and text have not changed since caught"
    )
    parser.add_argument(
        "--ptxsim", type=Path, default=ROOT.parent / "shared" / "tools" / "ptxsim", help="folder of ptxsim"
    )
    options = parser.parse_args()
    record = Record()
    words = [text for text in options.only or () if text not in families()]

    def wanted(family: str, mutation: Mutation) -> bool:
        named = not options.only or family in options.only or any(text in mutation.name for text in words)
        return named and not (options.resume and record.caught(mutation))

    chosen = {family: [m for m in mutations if wanted(family, m)] for family, mutations in families().items()}
    chosen = {family: mutations for family, mutations in chosen.items() if mutations}
    if not chosen and options.resume:
        print("every chosen fault was caught, and neither its file nor its text has changed since")
        return 0
    if not chosen:
        names = ", ".join(families())
        parser.error(f"--only {' '.join(options.only)}: neither families ({names}) nor in a fault's name")
    if options.list:
        for family, mutations in chosen.items():
            print(f"{family}: {len(mutations)}", *(f"  {m.name}" for m in mutations), sep="\n")
        return 0
    return run(chosen, record, options.ptxsim, options.jobs)


def run(chosen: dict[str, list[Mutation]], record: Record, ptxsim: Path, jobs: int) -> int:
    begin = time.monotonic()
    print("building the extension", flush=True)
    cpp_build.extension("quick")  # with every core: the copies share its objects
    idle: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
    for number in range(jobs):
        idle.put(Scratch(number, jobs))
    without_faults = Baseline(ptxsim)

    def caught(family: str, mutation: Mutation) -> bool:
        if not mutation.runs_here:
            print(f"NOT RUN: {mutation.name}: this processor has no {mutation.needs}", flush=True)
            return False
        scratch = idle.get()
        try:
            if not without_faults.passes(scratch, mutation.tests):
                print(f"NOT RUN: {mutation.name}: its tests fail without it", flush=True)
                return False
            found = _caught(scratch, mutation, ptxsim)
        finally:
            idle.put(scratch)
        record.add(family, mutation, found)
        return found

    every = [(family, m) for family, mutations in chosen.items() for m in mutations]
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = list(pool.map(lambda one: caught(*one), every))
    print()
    for family in chosen:
        found = [verdict for (name, _), verdict in zip(every, verdicts) if name == family]
        print(f"{family:12} {sum(found):3} of {len(found):3} caught")
    print(f"{'all':12} {sum(verdicts):3} of {len(verdicts):3} caught, {time.monotonic() - begin:.0f} s")
    return 0 if all(verdicts) else 1


class Baseline:
    """Whether selections of tests pass without a fault, each asked once."""

    def __init__(self, ptxsim: Path):
        self._ptxsim, self._lock = ptxsim, threading.Lock()
        self._found: dict[str, Future[bool]] = {}

    def passes(self, scratch: Scratch, tests: str) -> bool:
        """Runs the selection in a copy that has no fault, or waits for the thread that does."""
        with self._lock:
            first = tests not in self._found
            future = self._found.setdefault(tests, Future())
        if first:
            status, text = scratch.pytest(tests, self._ptxsim, SECONDS)
            if status:
                print(f"without a fault: {tests}: FAILS\n{text[-3000:]}", flush=True)
            future.set_result(status == 0)
        return future.result()


def _caught(scratch: Scratch, mutation: Mutation, ptxsim: Path) -> bool:
    """Whether the tests catch a fault; prints the verdict."""
    begin = time.monotonic()
    try:
        with scratch.seeded(mutation):
            status, text = scratch.pytest(mutation.tests, ptxsim, SECONDS)
    except (ValueError, RuntimeError) as error:
        status, text = 2, str(error)
    # 1: tests failed; < 0: the process died of a signal or was killed; any other status but 0: no tests ran.
    verdict = {0: "MISSED", 1: "caught"}.get(status, "caught (killed, or died)" if status < 0 else "NOT RUN")
    print(f"{verdict}: {mutation.name} ({time.monotonic() - begin:.0f} s)", flush=True)
    if verdict == "NOT RUN":
        print(text[-2000:], flush=True)
    return status == 1 or status < 0


if __name__ == "__main__":
    sys.exit(main())
