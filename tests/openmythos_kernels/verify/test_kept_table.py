"""docs/compile.csv, the table of compiled kernels: its rows are within budget, and changed kernels are compiled."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("triton")
from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.ahead import table
from openmythos_kernels.verify.ahead.command import TABLE
from openmythos_kernels.verify.specification import DTYPES

KEPT = table.read(Path(__file__).parents[3] / TABLE)
UPDATE = "run `python -m openmythos_kernels compile --update`"
SLICE = len(KEPT) // 8  # step between the rows that are compiled again at every run
MOST = 40  # the most changed kernels that a test compiles

same_compiler = pytest.mark.skipif(
    KEPT[0].triton != table.triton.__version__,
    reason=f"the table was made by triton {KEPT[0].triton}, here is {table.triton.__version__}",
)


def test_every_kept_row_is_within_budget():
    assert [fault for row in KEPT for fault in row.faults()] == []


@pytest.fixture(scope="module")
def wanted():
    return table.jobs(list(TARGETS), list(DTYPES))[0]


@same_compiler
def test_kernels_that_changed_are_no_worse(wanted):
    kept = {row.key for row in KEPT}
    changed = [job for key, job in wanted.items() if key not in kept]
    assert len(changed) <= MOST, f"{len(changed)} kernels are not in the table: {UPDATE}"
    before = {row.place: row for row in KEPT}
    rows = table.compile_all(changed)
    assert [fault for row in rows for fault in row.faults(before.get(row.place))] == []


@same_compiler
def test_a_slice_compiles_to_the_kept_figures(wanted):
    rows = [row for row in KEPT[::SLICE] if row.key in wanted]
    assert rows, UPDATE
    again = table.compile_all([wanted[row.key] for row in rows])
    assert [dataclasses.replace(row, seconds=0) for row in again] == [
        dataclasses.replace(row, seconds=0) for row in rows
    ]
