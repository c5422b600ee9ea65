"""The tables of compiled kernels: their rows are within budget, and changed kernels are compiled.

docs/compile.csv has every target and dtype by the newest Triton; the tables of older versions have some. Kernels are
compiled again by the installed Triton, and only if a table is its own.
"""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("triton")
from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.ahead import table
from openmythos_kernels.verify.ahead.command import OLDER, TABLE, table_of
from openmythos_kernels.verify.specification import DTYPES

ROOT = Path(__file__).parents[3]
TABLES = {path.name: table.read(ROOT / path) for path in (TABLE, *OLDER.values())}
VERSION = table.triton.__version__
KEPT = TABLES[table_of(VERSION).name]
UPDATE = "run `python -m openmythos_kernels compile --update`"
SLICE = len(KEPT) // 8  # step between the rows that are compiled again at every run
MOST = 40  # the most changed kernels that a test compiles

# Bytes that kernels are known to spill, at most: docs/proving-ground.md says so too.
SPILLS = {
    ("compile-3.7.csv", "sm_90", "attention_dkv_kernel"): 16,
    ("compile-3.7.csv", "sm_90", "down_backward_kernel"): 16,
    ("compile.csv", "sm_120", "loop_step_kernel"): 8,
    ("compile.csv", "sm_120", "route_kernel"): 8,
    ("compile.csv", "sm_120", "up_kernel"): 24,
}

every_table = pytest.mark.parametrize("name", TABLES)
same_compiler = pytest.mark.skipif(
    KEPT[0].triton != VERSION, reason=f"the table was made by triton {KEPT[0].triton}, here is {VERSION}"
)


def without_known_spills(row, name):
    known = row.spilled <= SPILLS.get((name, row.target, row.kernel), 0)
    return dataclasses.replace(row, spilled=0) if known else row


@every_table
def test_every_kept_row_is_within_budget(name):
    assert [fault for row in TABLES[name] for fault in without_known_spills(row, name).faults()] == []


@every_table
def test_every_product_names_its_stages(name):
    """So that none has one stage unseen: a row without the option would have the compiler's default."""
    products = [row for row in TABLES[name] if row.instruction in table.ASYNCHRONOUS]
    assert products and all("num_stages=" in row.configuration for row in products)
    assert not any(row.dtype == "fp32" for row in products)


def test_a_table_is_of_one_version():
    versions = {name: {row.triton for row in rows} for name, rows in TABLES.items()}
    assert all(len(found) == 1 for found in versions.values()), versions
    assert {name: table_of(*found).name for name, found in versions.items()} == {name: name for name in TABLES}


def test_the_newest_table_has_every_target_and_dtype():
    wanted = {(target, dtype) for target in TARGETS for dtype in DTYPES}
    assert {(row.target, row.dtype) for row in TABLES[TABLE.name]} == wanted


@pytest.fixture(scope="module")
def wanted():
    """The kernels of the targets and dtypes that the table has."""
    pairs, found = {(row.target, row.dtype) for row in KEPT}, {}
    for target in TARGETS:
        found |= table.jobs([target], [dtype for dtype in DTYPES if (target, dtype) in pairs])[0]
    return found


@same_compiler
def test_kernels_that_changed_are_no_worse(wanted):
    kept = {row.key for row in KEPT}
    changed = [job for key, job in wanted.items() if key not in kept]
    assert len(changed) <= MOST, f"{len(changed)} kernels are not in the table: {UPDATE}"
    before = {row.place: row for row in KEPT}
    rows = table.compile_all(changed)
    rows = [without_known_spills(row, table_of(VERSION).name) for row in rows]
    assert [fault for row in rows for fault in row.faults(before.get(row.place))] == []


@same_compiler
def test_a_slice_compiles_to_the_kept_figures(wanted):
    rows = [row for row in KEPT[::SLICE] if row.key in wanted]
    assert rows, UPDATE
    again = table.compile_all([wanted[row.key] for row in rows])
    assert [dataclasses.replace(row, seconds=0) for row in again] == [
        dataclasses.replace(row, seconds=0) for row in rows
    ]
