"""The drop-in ACTHalting."""

import pytest
import torch

from openmythos.recurrence import ACTHalting
from openmythos_kernels.nn import ACTHalting as Fast
from tests.kit.dtypes import ALL

D = 29


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_equals_the_reference(dtype):
    reference = ACTHalting(D).to(dtype)
    torch.nn.init.normal_(reference.halt.weight)
    torch.nn.init.normal_(reference.halt.bias)
    fast = Fast(D).to(dtype)
    fast.load_state_dict(reference.state_dict())
    h = normal(2, 3, D).to(dtype)
    grad = torch.randn(2, 3).to(torch.promote_types(dtype, torch.float32))
    results = []
    for module in (fast, reference):
        leaf = h.clone().requires_grad_()
        p = module(leaf)
        results.append((p, *torch.autograd.grad(p, [leaf, *module.parameters()], grad)))
    tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-6)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=tolerance, atol=4 * tolerance)
    other = normal(2, 3, D).to(torch.float32 if dtype == torch.float64 else torch.float64)
    torch.testing.assert_close(fast(other), reference(other))
