"""The command line: runs the suites, prints the tables, writes results/."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.machine import describe
from benchmarks.session import Session
from benchmarks.suites import ON_REQUEST, SUITES
from openmythos.training import corpus

# `python -m benchmarks` must end within five minutes; the rest is for the figures and a last round of samples.
SECONDS = 280


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares the reference, torch.compile, open-mythos and the fast modules on this machine.",
        epilog="Exits with 1 if a requirement is missed; --quick does not enforce the ones that depend on speed.",
    )
    parser.add_argument(
        "--only",
        choices=SUITES,
        action="append",
        metavar="SUITE",
        help=f"one of {', '.join(SUITES)}; {', '.join(sorted(ON_REQUEST))} run only when named",
    )
    parser.add_argument("--quick", action="store_true", help="a subset that takes about a minute")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument(
        "--corpus", type=Path, metavar="PATH", help="text file or folder; default: the Python standard library"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    began = time.monotonic()
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    name = str(options.corpus) if options.corpus else "Python standard library"
    session = Session(device, corpus(options.corpus).train, name, options.quick, ends=began + SECONDS)
    with session.progress.stage("machine: copy bandwidth, GEMM"):
        machine = describe(device)
    results = {"machine": machine, "quick": options.quick, "corpus": name, "suites": {}}
    for suite, run in SUITES.items():
        if suite in (options.only or SUITES.keys() - ON_REQUEST):
            results["suites"][suite] = run(session)
    results["seconds"] = time.monotonic() - began
    for table in report.tables(results):
        print("\n" + table.text())
    for path in report.write(results, options.out):
        print(f"wrote {path}")
    missed = [
        row for row in report.requirements(results) if not row["passed"] and not (options.quick and row["timing"])
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
