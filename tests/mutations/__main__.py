"""`python -m tests.mutations`: seeds small faults, one at a time, in a copy of the repository; tests should catch them.

First, every selection of tests must pass without a fault; otherwise "caught" would mean nothing.
Exits with 1 if a fault is missed or a list is out of date.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.mutations.mutation import ROOT, Mutation, families
from tests.mutations.scratch import Scratch

SECONDS = 600  # for one selection; a fault that makes the tests hang is caught


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="a family, or part of a fault's name")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    parser.add_argument(
        "--ptxsim", type=Path, default=ROOT.parent / "shared" / "tools" / "ptxsim", help="folder of ptxsim"
    )
    options = parser.parse_args()
    chosen = {
        family: [m for m in mutations if options.only in (None, family) or options.only in m.name]
        for family, mutations in families().items()
    }
    chosen = {family: mutations for family, mutations in chosen.items() if mutations}
    if not chosen:
        parser.error(f"--only {options.only}: neither a family ({', '.join(families())}) nor in a fault's name")
    if options.list:
        for family, mutations in chosen.items():
            print(f"{family}: {len(mutations)}", *(f"  {m.name}" for m in mutations), sep="\n")
        return 0
    return run(chosen, options.ptxsim)


def run(chosen: dict[str, list[Mutation]], ptxsim: Path) -> int:
    begin, scratch = time.monotonic(), Scratch()
    print("building the extension in a copy", flush=True)
    scratch.build()
    every = [m for mutations in chosen.values() for m in mutations]
    for tests in dict.fromkeys(m.tests for m in every):
        status, text = scratch.pytest(tests, ptxsim, SECONDS)
        print(f"without a fault: {tests}: {'passes' if status == 0 else 'FAILS'}", flush=True)
        if status:
            print(text[-3000:])
            return 1
    caught = {family: [_caught(scratch, m, ptxsim) for m in mutations] for family, mutations in chosen.items()}
    print()
    for family, found in caught.items():
        print(f"{family:12} {sum(found):3} of {len(found):3} caught")
    found = [one for those in caught.values() for one in those]
    print(f"{'all':12} {sum(found):3} of {len(found):3} caught, {time.monotonic() - begin:.0f} s")
    return 0 if all(found) else 1


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
