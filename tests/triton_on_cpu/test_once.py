"""Routed weights' gradients as one product over all calls: calls of several lengths, precision, limits."""

import pytest
import torch

from openmythos_kernels.ops.moe import RepeatedExperts
from openmythos_kernels.ops.moe import once as once_file
from openmythos_kernels.runtime.backends import forcing

D, INNER, E, K, SHARED = 24, 16, 5, 2, 1
ALWAYS = float("inf")

interpreted = pytest.mark.parametrize("triton_mode", ["interpreter"])


def weights(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def draw(count, *shape):
        return [(torch.randn(shape, generator=g) / 5).to(dtype).requires_grad_() for _ in range(count)]

    shapes = (INNER, D), (INNER, D), (D, INNER)
    return [draw(count, *shape) for count in (E, SHARED) for shape in shapes]


def calls(*tokens, dtype=torch.float32):
    """The last expert never has a token, and call c has none for the experts below c."""
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, D, generator=g).to(dtype).requires_grad_(),
            torch.randint(min(c, E - 2), E - 1, (n, K), generator=g),
            torch.rand(n, K, generator=g).to(dtype).requires_grad_(),
        )
        for c, n in enumerate(tokens)
    ]


def gradients(lists, inputs, once, dtype=None, among=None):
    """Of the weights, of x and of topk_weights; among: which calls enter the loss."""
    leaves = [*(w for ws in lists for w in ws), *(x for one in inputs for x in (one[0], one[2]))]
    with forcing("triton"):
        experts = RepeatedExperts(lists, dtype, once)
        results = [experts(*call).float().square().sum() for call in inputs]
        total = sum(result for c, result in enumerate(results) if among is None or c in among)
        return torch.autograd.grad(total, leaves, allow_unused=True)


def close(found, expected, tolerance=1e-5):
    for ours, other in zip(found, expected, strict=True):
        assert (ours is None) == (other is None)
        if ours is not None and ours.numel():
            torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@interpreted
@pytest.mark.parametrize("tokens", [(7, 21, 3), (9, 0, 4), (1, 1)], ids=str)
def test_calls_of_different_lengths(triton_mode, tokens):
    lists, inputs = weights(), calls(*tokens)
    close(gradients(lists, inputs, ALWAYS), gradients(lists, inputs, 0))


@interpreted
def test_calls_that_enter_no_loss(triton_mode):
    lists, inputs = weights(), calls(5, 8, 6)
    close(gradients(lists, inputs, ALWAYS, among=(0, 2)), gradients(lists, inputs, 0, among=(0, 2)))


@interpreted
def test_gradients_of_float32_masters_keep_float32(triton_mode):
    """Added call by call they are sums in float16."""
    lists, inputs = weights(), calls(6, 9, dtype=torch.float16)
    for once, kept in ((0, False), (ALWAYS, True)):
        routed = torch.cat([dw.flatten() for dw in gradients(lists, inputs, once, torch.float16)[: 3 * E]])
        assert routed.dtype == torch.float32 and routed.any()
        assert torch.equal(routed, routed.half().float()) != kept


@interpreted
def test_frozen_shared_experts_and_two_passes(triton_mode):
    lists, inputs = weights(), calls(6, 9)
    for w in (w for ws in lists[3:] for w in ws):
        w.requires_grad_(False)
    routed = [w for ws in lists[:3] for w in ws]
    with forcing("triton"):
        experts = RepeatedExperts(lists, once=ALWAYS)
        total = sum(experts(*call).square().sum() for call in inputs)
        first = torch.autograd.grad(total, routed, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(total, routed)))


@interpreted
def test_rows_beyond_the_limit_are_added_call_by_call(triton_mode, monkeypatch):
    lists, inputs = weights(), calls(6, 9)
    size = once_file.Rows.bytes(inputs[0][0], 15, K, INNER)
    made = []
    monkeypatch.setattr(once_file.Once, "gradients", lambda self: made.append(self) or [[]] * 6)
    gradients(lists, inputs, size - 1)
    assert not made
    gradients(lists, inputs, size)
    assert len(made) == 1
