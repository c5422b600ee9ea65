"""The down-projection of the LoRA."""

import pytest
import torch
import torch.nn.functional as F

from openmythos_kernels.ops.loop import loop_down
from openmythos_kernels.ops.loop.down import LOOP_DOWN
from tests.kit.compare import assert_same_function
from tests.kit.dtypes import ALL
from tests.kit.threads import for_each_number

D = 29


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("N, dim, rank", [(7, 97, 5), (0, 8, 2), (33, 64, 8), (5, 13, 0), (1, 1, 1), (9, 100, 4)])
def test_down_projection(N, dim, rank, dtype):
    f, down = torch.randn(N, dim).to(dtype), torch.randn(rank, dim).to(dtype)
    exact = f.double() @ down.double().t()
    got, eager = loop_down(f, down), F.linear(f, down)
    assert got.dtype == dtype and got.shape == eager.shape
    eps = torch.finfo(dtype).eps
    limit = 2 * (eager.double() - exact).norm() + 2 * eps * exact.norm()
    assert (got.double() - exact).norm() <= limit


def test_down_projection_contracts():
    f, down = normal(2, 3, D).requires_grad_(), normal(4, D).requires_grad_()
    torch.library.opcheck(LOOP_DOWN.overload, (f, down))
    assert_same_function(lambda *x: [loop_down(*x)], lambda *x: [F.linear(*x)], [f.detach(), down.detach()])
    with pytest.raises(ValueError, match="f, down: got"):
        loop_down(f, normal(4, D + 1))


@pytest.mark.parametrize("N, dim, rank", [(64 * 32 + 3, 21, 3), (70, 97, 8), (31, 16, 1), (5, 13, 0), (0, 8, 2)])
def test_down_projection_gradients(N, dim, rank):
    """With several blocks of rows, the last one partial; the same bits for any number of threads."""
    f, down, grad = normal(N, dim), normal(rank, dim), normal(N, rank)

    def gradients():
        leaves = [f.clone().requires_grad_(), down.clone().requires_grad_()]
        return torch.autograd.grad(loop_down(*leaves), leaves, grad)

    results = for_each_number((1, 2), gradients)
    for one, other, expected in zip(*results, (grad @ down, grad.t() @ f)):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
