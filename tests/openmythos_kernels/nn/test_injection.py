"""The drop-in LTIInjection."""

import torch

from openmythos.injection import LTIInjection
from openmythos_kernels.nn import LTIInjection as Fast
from tests.kit.compare import assert_same_function

D = 29


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_equals_the_reference():
    reference = LTIInjection(D).double()
    torch.nn.init.normal_(reference.log_A)
    fast = Fast(D).double()
    fast.load_state_dict(reference.state_dict())
    x = [normal(2, 3, D) for _ in range(3)]
    assert_same_function(lambda *x: [fast(*x)], lambda *x: [reference(*x)], x)
    torch.testing.assert_close(fast(x[0].float(), *x[1:]), reference(x[0].float(), *x[1:]))
