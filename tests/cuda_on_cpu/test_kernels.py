"""Every CUDA kernel, executed on the CPU, against the CPU kernels and the reference's error budget.

test_sanitizers.py runs `-k slice` again under each sanitizer.
"""

import pytest
import torch

from openmythos_kernels.ops.loop import loop_step
from openmythos_kernels.ops.loop.step import LOOP_STEP
from openmythos_kernels.runtime import unproven
from tests.cuda_on_cpu import cases, harness
from tests.openmythos_kernels.ops.loop import test_step as loop_tests

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALTING = {
    "some halted": {},
    "nothing halted": dict(cumulative_p=(0.0, 0.0), running=1.0, bias=-50.0),
    "all halt now": dict(cumulative_p=(0.0, 0.0), running=1.0, bias=50.0),
    "all halted": dict(cumulative_p=(0.7, 1.0), running=0.0),
    "cumulative_p above one": dict(cumulative_p=(1.1, 1.5), running=1.0),
}
# B, T, D, rank: whole packs, ragged packs, no LoRA, one position, prime sizes, no position, all ones.
SHAPES = [(2, 5, 24, 3), (1, 7, 97, 5), (3, 1, 31, 0), (1, 1, 64, 16), (1, 131, 13, 2), (0, 4, 16, 2), (1, 1, 1, 1)]


def check(make, compare, **sizes):
    expected, got = make(**sizes), harness.run(make, **sizes)
    assert compare(got, expected), sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, D, rank", SHAPES)
def test_step_shapes(B, T, D, rank, dtype):
    for enter in (True, False):
        check(
            cases.step_results,
            cases.close,
            B=B,
            T=T,
            D=D,
            rank=rank,
            dtype=dtype,
            enter=enter,
            spend_remainder=not enter,
        )


@pytest.mark.parametrize("halting", HALTING)
def test_step_halting(halting):
    check(cases.step_results, cases.close, B=2, T=9, D=40, rank=2, dtype=torch.float32, **HALTING[halting])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_misaligned(dtype):
    check(cases.step_results, cases.close, B=1, T=5, D=48, rank=2, dtype=dtype, offset=1)


@pytest.mark.parametrize("unused", [(0,), (1, 4), (2, 5), (0, 1, 2, 4)], ids=str)
def test_step_absent_gradients(unused):
    check(cases.step_results, cases.close, B=1, T=5, D=24, rank=2, dtype=torch.float64, unused=unused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_slice(dtype):
    """Several warps per row with ragged packs; two rows per team, one in the last; whole packs, aligned and not."""
    for sizes in (
        dict(B=1, T=3, D=1001, rank=2),
        dict(B=1, T=515, D=9, rank=1),
        dict(B=2, T=17, D=48, rank=3),
        dict(B=1, T=3, D=48, rank=1, offset=1),
    ):
        check(cases.step_results, cases.close, dtype=dtype, **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_whole_packs_slice(dtype, monkeypatch):
    """The kernels that OPENMYTHOS_UNPROVEN=1 selects have the bits of the others: an odd number of rows, absent
    gradients, rows longer than a block."""
    for sizes in (
        dict(B=1, T=35, D=192, rank=2),
        dict(B=1, T=3, D=128, rank=0, unused=(0, 1, 4)),
        dict(B=1, T=3, D=128, rank=1, enter=False),
        dict(B=1, T=2, D=4096, rank=1),
    ):
        monkeypatch.delenv(unproven.SWITCH, raising=False)
        proven = harness.run(cases.step_results, dtype=dtype, **sizes)
        with unproven.allowing():
            assert cases.equal(harness.run(cases.step_results, dtype=dtype, **sizes), proven), sizes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2056, 4096, 9001, 17000])
def test_step_long_rows(D, dtype):
    """Rows up to and past what a team can hold."""
    check(cases.step_results, cases.close, B=1, T=5, D=D, rank=1, dtype=dtype)
    if D < 5000:
        check(cases.step_results, cases.close, B=1, T=515, D=D, rank=1, dtype=dtype)


@pytest.mark.parametrize("D, T", [(9, 2117), (300, 701)])
def test_step_more_rows_than_teams(D, T):
    """Each team walks over several rows, as a warp and as a block; the last round is short."""
    check(cases.step_results, cases.close, B=1, T=T, D=D, rank=1, dtype=torch.bfloat16)


def test_step_row_longer_than_a_team_holds():
    check(
        cases.step_results,
        cases.close,
        B=1,
        T=3,
        D=4100,
        rank=1,
        dtype=torch.float64,
        running=1.0,
        cumulative_p=(0.0, 0.1),
    )


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_same_bits_in_any_order_of_threads(order):
    sizes = dict(B=3, T=23, D=260, rank=2, dtype=torch.bfloat16)
    expected = harness.run(cases.step_results, **sizes)
    for seed in (1, 2):
        with harness.device().order(order, seed):
            assert cases.equal(harness.run(cases.step_results, **sizes), expected)
            check(cases.compaction_results, cases.equal, B=3, T=701, D=3, running=0.5)


@pytest.mark.parametrize("dtype", loop_tests.LOW, ids=str)
@pytest.mark.parametrize("B, T, D, rank", [(2, 67, 96, 8), (1, 7, 97, 5), (1, 1, 64, 16)])
def test_step_error_budget(B, T, D, rank, dtype):
    """Outputs and gradients against the reference module in eager PyTorch and in float64."""
    harness.run(loop_tests.test_error_budget, B, T, D, rank, dtype)


@pytest.mark.parametrize("spend_remainder", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("B, T, D, rank", loop_tests.SHAPES)
def test_step_in_fp64_equals_the_reference(B, T, D, rank, last, spend_remainder):
    harness.run(loop_tests.test_fp64_equals_the_reference, B, T, D, rank, last, spend_remainder)


def test_the_decay_stays_below_one():
    harness.run(loop_tests.test_decay_stays_below_one_for_any_parameters, torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("running", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("B, T, D", [(3, 41, 24), (1, 1, 1), (0, 3, 4), (2, 0, 4), (5, 7, 33)])
def test_compaction(B, T, D, running, dtype):
    check(cases.compaction_results, cases.equal, B=B, T=T, D=D, running=running, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compaction_slice(dtype):
    """More positions than a tile, a ragged last tile, misaligned rows."""
    check(cases.compaction_results, cases.equal, B=3, T=1031, D=5, running=0.6, dtype=dtype)
    check(cases.compaction_results, cases.equal, B=2, T=9, D=16, running=0.6, dtype=dtype, offset=1)


@pytest.mark.slow
def test_compaction_of_more_tiles_than_one_block_scans_at_once():
    check(cases.compaction_results, cases.equal, B=1, T=1024 * 1025 + 3, D=1, running=0.5, dtype=torch.uint8)


@pytest.mark.parametrize("N, D, dtype", [(256, 256, torch.float32), (1024, 128, torch.bfloat16)])
def test_bytes_moved(N, D, dtype):
    """Passes over an (N, D) tensor: 7 forward, at most 12 backward, of which the matrix library makes two."""
    x = cases.step_arguments(1, N, D, 4, dtype)
    scalars = dict(loop=1, threshold=0.7, spend_remainder=False, enter=True, eps=1e-6)
    one_pass = N * D * x["h"].element_size()
    with harness.device().counting() as counted:
        harness.run(loop_step, *x.values(), **scalars)
    assert counted[0].loaded == 4 * one_pass and counted[0].stored == 3 * one_pass
    for value in x.values():
        value.requires_grad_(value.is_floating_point())
    out = harness.run(LOOP_STEP, *x.values(), *scalars.values())
    with harness.device().counting() as counted:
        graded = [out[i] for i in (0, 1, 2, 4, 5)]
        harness.run(torch.autograd.backward, graded, [torch.ones_like(o) for o in graded])
    library = 2 * one_pass  # dlora_hidden and dlora_B: each product reads df once
    assert 11 * one_pass < counted[0].loaded + counted[0].stored + library <= 12 * one_pass


def test_a_failed_launch_is_an_exception():
    x = cases.step_arguments(1, 1, 8, 0, torch.float32)
    scalars = dict(loop=1, threshold=0.7, spend_remainder=False, enter=True, eps=1e-6)
    library = harness.device().library
    library.cuda_on_cpu_set_error(719)
    with pytest.raises(RuntimeError, match="CUDA error"):
        harness.run(loop_step, *x.values(), **scalars)
    harness.run(loop_step, *x.values(), **scalars)  # an error is reported once
