"""`python -m openmythos_kernels compile`: recorded launches, figures of machine code, and what counts as a fault."""

import dataclasses
import re
import subprocess
import sys

import pytest

from openmythos_kernels.runtime.target import TARGETS

triton = pytest.importorskip("triton")
from openmythos_kernels.verify.ahead import table  # noqa: E402 - needs triton
from openmythos_kernels.verify.ahead.build import gpu_target, occupancy  # noqa: E402 - needs triton

ROW = table.Row("op", "kernel", "bf16", "sm_80", "1b", "BLOCK=64", 64, 0, 1024, 4, 0.5, "mma.sync", 1.0, "3.9.0", "0")


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "openmythos_kernels", "compile", *arguments],
        capture_output=True,
        text=True,
    )


def test_compiles_the_loop_step_and_keeps_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    done = command("--only", "loop_step", "--targets", "sm_90", "--dtypes", "bf16", "--table", str(path), "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table.read(path)
    assert {"loop_step_kernel", "loop_step_backward_kernel", "loop_sums_kernel"} <= {row.kernel for row in rows}
    assert all(row.registers and not row.spilled and 0 < row.occupancy <= 1 for row in rows)


@pytest.mark.parametrize("dtype, instruction", [("bf16", "mma.sync"), ("fp32", "")])
def test_products_in_a_dtype_that_has_an_instruction_use_it(dtype, instruction):
    jobs, _ = table.jobs(["sm_80"], [dtype], ["mla_attend_latent"], "mythos_1b")
    row = next(r for r in map(table.compile_job, jobs.values()) if r.kernel == "attend_latent_kernel")
    assert row.instruction == instruction


def test_sizes_that_an_op_refuses_are_named(monkeypatch):
    def refuse(*_):
        raise ValueError("x: got too much")

    monkeypatch.setattr(table, "_launches", refuse)
    found, refused = table.jobs(["sm_80"], ["bf16"], ["moe_experts"], "mythos_500b, decoding")
    assert not found and refused[0] == "moe_experts, mythos_500b, decoding, bf16, sm_80: x: got too much"


def test_no_shipped_size_is_refused():
    assert table.jobs(["sm_90"], ["bf16"])[1] == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spilled=8), "spills 8 bytes"),
        (dict(shared=1 << 20), "shared memory"),
        (dict(instruction="missing"), "without a matrix instruction"),
        (dict(occupancy=0.25), "occupancy 0.25, was 0.50"),
        (dict(instruction="wgmma", configuration="BM=64 num_stages=1 num_warps=4"), "wgmma in a loop of one stage"),
        (dict(instruction="tcgen05.mma", configuration="num_stages=1"), "tcgen05.mma in a loop of one stage"),
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


def test_the_activation_moves_16_bytes_at_a_time():
    """With 2 bytes a load, as the mask's bound had no known divisor, an H200 reached a third of its bandwidth."""
    jobs, _ = table.jobs(["sm_90"], ["bf16"], ["moe_experts"], "mythos_1b")
    found = [launch for launch in (job.launch() for job in jobs.values()) if launch.name.startswith("swiglu")]
    assert {launch.name for launch in found} == {"swiglu_kernel", "swiglu_backward_kernel"}
    for launch in found:
        code = triton.compile(launch.source(), target=gpu_target(TARGETS["sm_90"]), options=launch.options).asm["ptx"]
        assert set(re.findall(r"(?:ld|st)\.global\S*", code)) == {"ld.global.v4.b32", "st.global.v4.b32"}
