"""RMSNorm alone and behind a residual addition, against `openmythos.RMSNorm`."""

import pytest
import torch

from openmythos.layers import RMSNorm
from openmythos_kernels.ops.norm import add_rms_norm, rms_norm
from openmythos_kernels.ops.norm.rms_norm import RMS_NORM
from openmythos_kernels.verify.budget import assert_within_budget, pooled

LOW = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 7, 24), (3, 1), (1, 97), (131, 64), (2, 16)]


def run(dtype, x, add, weight, grads, function):
    """Outputs and gradients; `function` maps x, add, weight to (sum or None, norm)."""
    x, add, weight = (t.to(dtype).requires_grad_() for t in (x, add, weight))
    total, y = function(x, add, weight)
    outputs = [t for t in (total, y) if t is not None]
    torch.autograd.backward(outputs, [g.to(dtype) for g in grads[: len(outputs)]])
    values = {f"out {i}": t.detach() for i, t in enumerate(outputs)}
    return values | {"grad x": x.grad, "grad add": add.grad, "grad weight": weight.grad}


def reference(x, add, weight):
    norm = RMSNorm(weight.numel())
    del norm.weight
    norm.weight = weight
    return x + add, norm(x + add)


def draw(shape, dtype, seed):
    torch.manual_seed(seed)
    x, add = (torch.randn(shape).to(dtype).double() for _ in range(2))
    weight = (1 + 0.3 * torch.randn(shape[-1])).to(dtype).double()
    grads = [torch.randn(shape).to(dtype).double() for _ in range(2)]
    return [
        run(d, x, add, weight, grads, function)
        for d, function in ((dtype, add_rms_norm), (dtype, reference), (torch.float64, reference))
    ]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    assert_within_budget(*(pooled(r) for r in zip(*(draw(shape, dtype, seed) for seed in range(6)))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_equals_the_reference(shape):
    fast, eager, _ = draw(shape, torch.float64, 0)
    for name, x in eager.items():
        torch.testing.assert_close(fast[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_without_addition_it_is_the_norm_of_x(dtype):
    x = torch.randn(5, 33).to(dtype).requires_grad_()
    weight = torch.randn(33).to(dtype).requires_grad_()
    zero = torch.zeros_like(x)
    grads = []
    for y in (rms_norm(x, weight), add_rms_norm(x, zero, weight)[1]):
        grads.append((y, *torch.autograd.grad(y.float().sin().sum(), (x, weight))))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_gradient_of_the_sum_alone():
    x, add, weight = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True), torch.ones(8)
    add_rms_norm(x, add, weight)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8)) and torch.equal(add.grad, torch.ones(3, 8))


@pytest.mark.parametrize("N", [1, 77, 2111])
def test_same_bits_for_any_number_of_threads(N):
    x, weight = torch.randn(N, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = rms_norm(x, weight)
            results.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_strided_and_empty_inputs():
    x, weight = torch.randn(6, 5, 16).transpose(0, 1), torch.randn(32)[::2]
    assert torch.equal(rms_norm(x, weight), rms_norm(x.contiguous(), weight.contiguous()))
    assert rms_norm(x[:0], weight).shape == (0, 6, 16)


def test_contracts():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    torch.library.opcheck(RMS_NORM.overload, (x, None, weight, 1e-6))
    torch.library.opcheck(RMS_NORM.overload, (x, x.detach().clone(), weight, 1e-6))
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, x, weight), add_rms_norm(x, x, weight)):
        assert torch.equal(a, b)


def test_bad_input_is_one_clear_error():
    x, weight = torch.randn(3, 16), torch.randn(16)
    for match, arguments in (
        ("x: got torch.int64", (x.long(), x, weight)),
        (r"weight: got torch.float32 of shape \(8,\)", (x, x, weight[:8])),
        ("weight: got torch.float64", (x, x, weight.double())),
        (r"add: got torch.float32 of shape \(2, 16\)", (x, x[:2], weight)),
    ):
        with pytest.raises(ValueError, match=match):
            add_rms_norm(*arguments)
