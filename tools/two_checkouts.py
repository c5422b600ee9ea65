"""`python -m tools.two_checkouts BASE`: the benchmarks of another checkout and of this one, in turn.

Both run on this machine with this interpreter, each with its own extension, as whole processes in turn: base, new, new,
base, ... A row is what one suite measures of the fast modules. Its figure is the median time of the base over the
median time of this checkout: below 1, this one is slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parents[1]
FAST = ("ours", "triton", "trimmed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.two_checkouts", description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="the other checkout, its extension built")
    parser.add_argument("--only", action="append", default=[], metavar="SUITE", help="as of `python -m benchmarks`")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout; default 3")
    parser.add_argument("--least", type=float, default=0.98, help="the smallest ratio that passes; default 0.98")
    options = parser.parse_args()
    only = [word for suite in options.only for word in ("--only", suite)]
    base, new = options.base.resolve(), HERE
    seconds: dict[str, dict[Path, list[float]]] = defaultdict(lambda: defaultdict(list))
    order = [c for i in range(options.rounds) for c in ((base, new) if i % 2 == 0 else (new, base))]
    for checkout in tqdm(order, unit="run"):
        for row, measured in times(run(checkout, only)):
            seconds[row][checkout] += measured
    slower = 0
    for row, by_checkout in seconds.items():
        if len(by_checkout) == 2:
            ratio = statistics.median(by_checkout[base]) / statistics.median(by_checkout[new])
            slower += ratio < options.least
            counts = f"{len(by_checkout[base])} and {len(by_checkout[new])} times"
            print(f"{row:<60} {ratio:5.3f}  ({counts}){'' if ratio >= options.least else '  SLOWER'}")
    print(f"{slower} of {len(seconds)} rows below {options.least}")
    return int(slower > 0)


def run(checkout: Path, only: list[str]) -> dict:
    """The results of a run of the benchmarks there."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks", *only, "--out", out]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        file = Path(out, "results.json")
        if not file.exists():
            raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
        return json.loads(file.read_text())["suites"]


def times(value, row: str = "") -> Iterator[tuple[str, list[float]]]:
    """Every list of seconds of a fast module, by its place in the results."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from times(inner, f"{row}/{key}" if row else key)
    elif isinstance(value, list) and "/seconds/" in f"/{row}/" and row.rpartition("/")[2] in FAST:
        yield row, [float(x) for x in value]


if __name__ == "__main__":
    sys.exit(main())
