"""RMSNorm alone and behind a residual addition: what its specification does not reach (that: test_specifications.py)."""

import pytest
import torch

from openmythos.layers import RMSNorm
from openmythos_kernels.ops.norm import add_rms_norm, rms_norm

LOW = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(4, 7, 24), (3, 1), (1, 97), (131, 64), (2, 16)]


def run(x, add, weight, grads, function):
    """Outputs and gradients; `function` maps x, add, weight to (sum or None, norm)."""
    x, add, weight = (t.clone().requires_grad_() for t in (x, add, weight))
    total, y = function(x, add, weight)
    outputs = [t for t in (total, y) if t is not None]
    torch.autograd.backward(outputs, grads[: len(outputs)])
    values = {f"out {i}": t.detach() for i, t in enumerate(outputs)}
    return values | {"grad x": x.grad, "grad add": add.grad, "grad weight": weight.grad}


def reference(x, add, weight):
    norm = RMSNorm(weight.numel())
    del norm.weight
    norm.weight = weight
    return x + add, norm(x + add)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64_equals_the_reference(shape):
    x, add, *grads = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    weight = 1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)
    fast, eager = (run(x, add, weight, grads, function) for function in (add_rms_norm, reference))
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


def test_strided_and_empty_inputs():
    x, weight = torch.randn(6, 5, 16).transpose(0, 1), torch.randn(32)[::2]
    assert torch.equal(rms_norm(x, weight), rms_norm(x.contiguous(), weight.contiguous()))
    assert rms_norm(x[:0], weight).shape == (0, 6, 16)


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
