"""Attention of packed rows."""

import pytest
import torch

from openmythos_kernels.ops import mla


def packed(counts, keys, dtype=torch.float64, heads=2, nope=5, rope=4, v=3, seed=0):
    """Random inputs with counts[b] rows in sequence b, at random places."""
    g = torch.Generator().manual_seed(seed)
    at = [torch.randperm(keys, generator=g)[:n].sort()[0] for n in counts]
    B, N = len(counts), sum(counts)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return dict(
        q_nope=draw(N, heads, nope),
        q_rope=draw(N, heads, rope),
        kv=draw(B, keys, heads, nope + v),
        k_rope=draw(B, keys, rope),
        position=torch.cat([*at, torch.empty(0, dtype=torch.int64)]),
        offset=torch.tensor([0, *counts]).cumsum(0),
    )


def test_float64():
    """float64 takes the formula, whose gradients are those of its values."""
    inputs = packed([3, 0, 1, 5], 5)
    names = ("q_nope", "q_rope", "kv", "k_rope")
    leaves = [inputs.pop(name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *x: mla.attention_rows(**dict(zip(names, x)), **inputs)[0], leaves)


@pytest.mark.parametrize("name", ["q_nope", "q_rope", "kv", "k_rope", "position", "offset"])
def test_errors(name):
    inputs = packed([2, 1], 4)
    for bad in (inputs[name][..., None, None], inputs[name].to(torch.int32)):
        with pytest.raises(ValueError, match=f"^{name}: got .*must be"):
            mla.attention_rows(**{**inputs, name: bad})
