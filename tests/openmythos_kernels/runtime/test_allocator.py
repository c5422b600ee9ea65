"""The memory of the CPU code's large results (csrc/cpu/runtime/allocator.h): huge pages, kept for the next result."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.ops.norm import rms_norm
from openmythos_kernels.runtime import extension

MIB = 2**20
HUGE = 2 * MIB

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads from /proc what is resident")


@pytest.fixture(autouse=True, scope="module")
def needs_extension():
    assert extension.module is not None, extension.reason


def result(mib: float) -> torch.Tensor:
    """A result of so many MiB."""
    x = torch.ones(1, 1024).expand(int(mib * 256), 1024)
    return rms_norm(x, torch.ones(1024))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_large_results_begin_at_a_huge_page():
    held = [result(4) for _ in range(3)]  # malloc's memory begins behind a header
    assert {y.data_ptr() % HUGE for y in held} == {0}
    assert len({y.data_ptr() for y in held}) == 3


def test_the_next_result_takes_the_memory_of_the_last():
    first = result(9).data_ptr()
    one, other = result(9), result(9)
    assert one.data_ptr() == first != other.data_ptr()
    del one, other
    first = result(9).data_ptr()
    assert result(8.5).data_ptr() == first  # a smaller result, as when a loop's rows become fewer
    assert result(3).data_ptr() != first  # too small: it would waste most of the memory


def test_the_smallest_block_that_fits_is_taken():
    small, large = result(21), result(25)
    places = small.data_ptr(), large.data_ptr()
    del small
    del large  # freed last
    found = result(20), result(24)
    assert tuple(y.data_ptr() for y in found) == places


@needs_linux
def test_what_is_kept_is_bounded():
    held = [result(300) for _ in range(3)]
    before = resident()
    del held
    assert resident() < before - 550 * MIB


def test_pytorch_fills_them_where_it_fills_what_nobody_has_written():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert result(4).data_ptr() % HUGE
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_profiler_sees_them():
    x, weight = torch.ones(1024, 1024), torch.ones(1024)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = rms_norm(x, weight)
        del y
    sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes.count(4 * MIB) == 1 and sizes.count(-4 * MIB) == 1


def test_results_are_ordinary_tensors():
    y = result(4)
    twin = copy.deepcopy(y)
    assert y.untyped_storage().nbytes() == y.nbytes
    y.share_memory_()
    assert y.equal(twin) and y.is_shared()
    y = result(4)
    y.resize_(2 * y.numel())
    assert y[: y.numel() // 2].reshape(twin.shape).equal(twin)


class TestWeightGradients:
    """Experts' gradients: many small tensors in one block of memory."""

    @pytest.fixture
    def grads(self):
        E, D, I = 64, 128, 512
        weights = [[torch.randn(*shape).requires_grad_() for _ in range(E)] for shape in ((I, D), (I, D), (D, I))]
        idx, topk_weights = torch.tensor([[3, 5]]), torch.full((1, 2), 0.5)
        y = moe_experts(torch.randn(1, D), idx, topk_weights, *weights)

        def make():
            return torch.autograd.grad(y.sum(), [w for ws in weights for w in ws], retain_graph=True)

        return make

    @needs_linux
    def test_zeros_take_no_memory_until_they_are_used(self, grads):
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not setting.exists() or "[never]" in setting.read_text():
            pytest.skip("this system has no huge pages: zeros are written")
        grads()
        before = resident()
        made = grads()
        assert resident() - before < sum(g.nbytes for g in made) / 4
        assert not made[0].any() and made[3].any()

    def test_each_is_its_own(self, grads):
        made = list(grads())
        made[0].fill_(1.0)
        made[3].fill_(1.0)
        assert not made[1].any() and not made[2].any()
        assert not made[5].eq(1.0).all()

    def test_one_outlives_the_others(self, grads):
        made = list(grads())
        zero, used, values = made[0], made[3], made[3].clone()
        del made
        others = [result(8) for _ in range(3)]
        zero += 2.0
        assert zero.eq(2.0).all() and used.equal(values) and others[0].isfinite().all()

    def test_each_has_a_storage_that_gives_its_memory_up(self, grads):
        made = list(grads())
        used = made[3].clone()
        for i in (0, 5):
            storage = made[i].untyped_storage()
            assert storage.nbytes() == made[i].nbytes
            storage.resize_(0)
            assert storage.nbytes() == 0
            storage.resize_(used.nbytes)
            made[i].fill_(7.0)
        assert made[3].equal(used) and not made[1].any()

    @needs_linux
    @pytest.mark.parametrize("kept", [0, 3], ids=["of an idle expert", "of a used one"])
    def test_who_keeps_one_does_not_keep_all(self, kept):
        E, D, I = 16, 256, 1024
        weights = [[torch.randn(*shape).requires_grad_() for _ in range(E)] for shape in ((I, D), (I, D), (D, I))]
        idx, topk_weights = torch.arange(1, E).repeat(2)[None].t(), torch.ones(2 * E - 2, 1)
        y = moe_experts(torch.randn(2 * E - 2, D), idx, topk_weights, *weights)
        held, before = [], 0
        for step in range(12):
            made = torch.autograd.grad(y.sum(), [w for ws in weights for w in ws], retain_graph=True)
            made[0].add_(1.0)
            held.append(made[kept])
            del made
            before = before or (step == 1 and resident())
        expected = held[1].clone()
        assert (
            resident() - before < (len(held) + 2) * held[0].nbytes + 3 * E * D * I * 4
        )  # the last step's waits for a next one
        assert all(one.equal(expected) for one in held)
