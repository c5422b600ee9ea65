"""The parts of the loop step, each against the reference's module."""

import pytest
import torch
import torch.nn.functional as F

from openmythos.injection import LTIInjection
from openmythos.layers import RMSNorm
from openmythos.recurrence import ACTHalting, ACTState
from openmythos.recurrence import act_update as reference_update
from openmythos_kernels.ops.loop import act_update, inject_norm, lti_update
from tests.kit.compare import assert_same_function

D = 29


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_lti_update():
    def reference(h, e, f, log_A, log_dt, B):
        return [torch.func.functional_call(LTIInjection(D).double(), dict(log_A=log_A, log_dt=log_dt, B=B), (h, e, f))]

    assert_same_function(
        lambda *x: [lti_update(*x)], reference, [normal(2, 5, D) for _ in range(3)] + [normal(D), normal(1), normal(D)]
    )


@pytest.mark.parametrize("spend_remainder", [False, True])
def test_act_update(spend_remainder):
    running = torch.rand(2, 5) < 0.7

    def fast(h, h_out, cumulative_p, ponder, weight, bias):
        return act_update(h, h_out, cumulative_p, running, ponder, weight, bias, 2, 0.7, spend_remainder)

    def reference(h, h_out, cumulative_p, ponder, weight, bias):
        act = {"halt.weight": weight, "halt.bias": bias}
        p = torch.func.functional_call(ACTHalting(D).double(), act, (h,))
        return reference_update(ACTState(h_out, cumulative_p, running, ponder), h, p, 2, 0.7, spend_remainder)

    wide = [torch.rand(2, 5, dtype=torch.float64) for _ in range(2)]
    assert_same_function(fast, reference, [normal(2, 5, D), normal(2, 5, D), *wide, normal(1, D), normal(1)])


@pytest.mark.parametrize("embedded", [None, 3])
def test_inject_norm(embedded):
    emb = None if embedded is None else normal(embedded)

    def reference(h, e, weight):
        x = h + e if emb is None else h + F.pad(emb, (0, D - embedded)) + e
        return [torch.func.functional_call(RMSNorm(D).double(), {"weight": weight}, (x,))]

    leaves = [normal(2, 5, D), normal(2, 5, D), normal(D)]
    assert_same_function(lambda h, e, weight: [inject_norm(h, e, weight, emb)], reference, leaves)


@pytest.mark.parametrize("seed", range(3))
def test_spectral_radius_after_a_thousand_steps_at_rate_ten(seed):
    torch.manual_seed(seed)
    injection = LTIInjection(16)
    with torch.no_grad():
        injection.log_A.copy_(torch.randn(16) * 10.0**seed)
        injection.log_A[:4] = torch.tensor([1e30, -1e30, -16.6, 20.0])
    optimizer = torch.optim.SGD(injection.parameters(), lr=10.0)
    for _ in range(1000):
        h, e, f = (torch.randn(3, 16) for _ in range(3))
        optimizer.zero_grad()
        lti_update(h, e, f, injection.log_A, injection.log_dt, injection.B).sum().backward()
        assert all(p.grad.isfinite().all() for p in injection.parameters())
        optimizer.step()
        one, none = torch.ones(1, 16), torch.zeros(1, 16)
        A = lti_update(one, none, none, injection.log_A, injection.log_dt, injection.B)
        assert (A >= 0).all() and (A < 1).all()
