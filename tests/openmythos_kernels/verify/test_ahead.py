"""`python -m openmythos_kernels compile`: what is recorded, what machine code needs, what counts as a fault."""

import dataclasses
import subprocess
import sys

import pytest

from openmythos_kernels.runtime.target import TARGETS

pytest.importorskip("triton")
from openmythos_kernels.verify.ahead import table  # noqa: E402
from openmythos_kernels.verify.ahead.build import occupancy  # noqa: E402

ROW = table.Row("op", "kernel", "bf16", "sm_80", "1b", "BLOCK=64", 64, 0, 1024, 4, 0.5, "mma.sync", "3.9.0", "0")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "openmythos_kernels", "compile", *arguments], capture_output=True, text=True
    )


def test_compiles_the_loop_step_and_keeps_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    done = command("--only", "loop_step", "--targets", "sm_90", "--dtypes", "bf16", "--table", str(path), "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table.read(path)
    assert {"loop_step_kernel", "loop_step_backward_kernel", "loop_sums_kernel"} <= {row.kernel for row in rows}
    assert all(row.registers and not row.spilled and 0 < row.occupancy <= 1 for row in rows)


def test_kernels_that_multiply_matrices_have_the_instruction():
    jobs = table.jobs(["sm_80"], ["bf16"], ["mla_attention"], "mythos_1b")
    row = next(r for r in map(table.compile_job, jobs.values()) if r.kernel == "attention_kernel")
    assert row.instruction == "mma.sync"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spilled=8), "spills 8 bytes"),
        (dict(shared=1 << 20), "shared memory"),
        (dict(instruction="missing"), "without a matrix instruction"),
        (dict(occupancy=0.25), "occupancy 0.25, was 0.50"),
    ],
)
def test_faults(change, message):
    (fault,) = dataclasses.replace(ROW, **change).faults(ROW)
    assert message in fault
    assert not ROW.faults(ROW)


def test_occupancy_by_hand():
    assert occupancy(TARGETS["sm_80"], 64, 0, 4) == 0.5  # 65536 / (64 * 128) = 8 blocks of 4 warps of 64
    assert occupancy(TARGETS["sm_80"], 32, 100 << 10, 4) == 4 / 64  # one block by shared memory
    assert occupancy(TARGETS["sm_80"], 32, 200 << 10, 4) == 0  # none


def test_a_bad_target_is_one_clear_error():
    done = command("--targets", "sm_20")
    assert done.returncode == 2 and "--targets: got sm_20, must be of sm_80" in done.stdout
