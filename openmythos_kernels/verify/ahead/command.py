"""`python -m openmythos_kernels compile`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.specification import DTYPES

TABLE = Path("docs/compile.csv")  # of the newest Triton, for every target and dtype
OLDER = {"3.6": Path("docs/compile-3.6.csv"), "3.7": Path("docs/compile-3.7.csv")}  # for some


def table_of(version: str) -> Path:
    """The table of a Triton version such as "3.6.0"."""
    return OLDER.get(".".join(version.split(".")[:2]), TABLE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)} (all)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)} (all)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="OP", help="one op, or a prefix such as mla; repeatable"
    )
    parser.add_argument(
        "--variants", default="", metavar="TEXT", help="only shipped sizes whose name contains TEXT, such as 1b (all)"
    )
    parser.add_argument(
        "--table", type=Path, help=f"where rows are compared and kept ({TABLE}, or the installed Triton's own)"
    )
    parser.add_argument("--changed", action="store_true", help="only kernels that the table has not, as they are now")
    parser.add_argument("--update", action="store_true", help="write the rows compiled into the table")


def main(options: argparse.Namespace) -> int:
    """Prints what the kernels need. Returns 1 if one breaks a budget or is worse than its row in the table, 2 for wrong
    arguments or without Triton."""
    if not importlib.util.find_spec("triton"):
        print("compile: triton is not installed")
        return 2
    from openmythos_kernels.verify.ahead import table

    path = options.table or table_of(table.triton.__version__)
    for name, given, known in (("--targets", options.targets, TARGETS), ("--dtypes", options.dtypes, DTYPES)):
        unknown = [item for item in given.split(",") if item not in known]
        if unknown:
            print(f"compile: {name}: got {', '.join(unknown)}, must be of {', '.join(known)}")
            return 2
    kept = table.read(path) if path.exists() else []
    wanted, refused = table.jobs(options.targets.split(","), options.dtypes.split(","), options.only, options.variants)
    same = {row.key: row for row in kept if row.key in wanted} if options.changed else {}
    rows = table.compile_all([job for key, job in wanted.items() if key not in same])
    print(f"static figures, compiled by triton {table.triton.__version__}, no GPU involved")
    print(table.summary(rows))
    before = {row.place: row for row in kept}
    faults = [fault for row in rows for fault in row.faults(before.get(row.place))] + [
        f"refused: {text}" for text in refused
    ]
    print(
        "\n".join(faults)
        if faults
        else f"{len(rows)} kernels: no spills, shared memory and matrix instructions as required"
    )
    if options.update:
        table.write(table.merged(kept, [*same.values(), *rows]), path)
        print(f"wrote {path}")
    return int(bool(faults))
