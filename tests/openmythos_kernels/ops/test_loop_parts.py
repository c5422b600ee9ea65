"""The step's parts and the down-projection, each against the reference's module."""

import pytest
import torch
import torch.nn.functional as F

from openmythos.injection import LTIInjection
from openmythos.layers import RMSNorm
from openmythos.recurrence import ACTHalting, ACTState
from openmythos.recurrence import act_update as reference_update
from openmythos_kernels.ops.loop import act_update, inject_norm, loop_down, lti_update
from openmythos_kernels.ops.loop.down import LOOP_DOWN

D = 29


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def same(fast, reference, leaves):
    """Equal results and equal gradients of every leaf, for random gradients of the results."""
    results = []
    for function in (fast, reference):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = [x for x in function(*inputs) if x.is_floating_point()]
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, inputs, [torch.randn_like(x) for x in out], allow_unused=True)
        results.append([*out, *grads])
    for a, b in zip(*results, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lti_update():
    def reference(h, e, f, log_A, log_dt, B):
        return [torch.func.functional_call(LTIInjection(D).double(), dict(log_A=log_A, log_dt=log_dt, B=B), (h, e, f))]

    same(
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
    same(fast, reference, [normal(2, 5, D), normal(2, 5, D), *wide, normal(1, D), normal(1)])


@pytest.mark.parametrize("embedded", [None, 3])
def test_inject_norm(embedded):
    emb = None if embedded is None else normal(embedded)

    def reference(h, e, weight):
        x = h + e if emb is None else h + F.pad(emb, (0, D - embedded)) + e
        return [torch.func.functional_call(RMSNorm(D).double(), {"weight": weight}, (x,))]

    same(lambda h, e, w: [inject_norm(h, e, w, emb)], reference, [normal(2, 5, D), normal(2, 5, D), normal(D)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
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
    same(lambda *x: [loop_down(*x)], lambda *x: [F.linear(*x)], [f.detach(), down.detach()])
    with pytest.raises(ValueError, match="f, down: got"):
        loop_down(f, normal(4, D + 1))


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


def test_injection_module_is_a_drop_in():
    from openmythos_kernels.nn import LTIInjection as Fast

    reference = LTIInjection(D).double()
    torch.nn.init.normal_(reference.log_A)
    fast = Fast(D).double()
    fast.load_state_dict(reference.state_dict())
    x = [normal(2, 3, D) for _ in range(3)]
    same(lambda *x: [fast(*x)], lambda *x: [reference(*x)], x)
    torch.testing.assert_close(fast(x[0].float(), *x[1:]), reference(x[0].float(), *x[1:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_halting_module_is_a_drop_in(dtype):
    from openmythos.recurrence import ACTHalting
    from openmythos_kernels.nn import ACTHalting as Fast

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


@pytest.mark.parametrize("N, dim, rank", [(64 * 32 + 3, 21, 3), (70, 97, 8), (31, 16, 1), (5, 13, 0), (0, 8, 2)])
def test_down_projection_gradients(N, dim, rank):
    """Several row blocks, the last ragged; the same bits for any number of threads."""
    f, down, grad = normal(N, dim), normal(rank, dim), normal(N, rank)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            leaves = [f.clone().requires_grad_(), down.clone().requires_grad_()]
            results.append(torch.autograd.grad(loop_down(*leaves), leaves, grad))
    finally:
        torch.set_num_threads(threads)
    for one, other, expected in zip(*results, (grad @ down, grad.t() @ f)):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
