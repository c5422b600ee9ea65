"""The drop-in TransformerBlock against the reference: outputs, gradients and fallbacks."""

import copy

import pytest
import torch
from torch import nn

from openmythos.attention import CausalMask
from openmythos.block import TransformerBlock
from openmythos.layers import rotary_table
from openmythos_kernels import nn as fast
from openmythos_kernels.ops.moe.ffn import swiglu_ffn
from tests.kit.compare import swapped
from tests.kit.tiny import enliven, relative, tiny_config


def pair(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    block = enliven(TransformerBlock(tiny_config(**fields))).to(dtype)
    return block, swapped(block, fast.TransformerBlock)


def call(block, tokens=6, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(2, tokens, 24).to(dtype).requires_grad_(torch.is_grad_enabled())
    y = block(x, rotary_table(4, tokens, 100.0), CausalMask(0, tokens))
    if not torch.is_grad_enabled():
        return [y]
    return [y, *torch.autograd.grad(y.float().sin().sum(), (x, *block.parameters()))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_output_and_gradients_equal_the_reference(dtype, tolerance):
    block, fast_block = pair(dtype)
    assert fast_block.backend().fast
    for a, b in zip(call(fast_block, dtype=dtype), call(block, dtype=dtype), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 8, 9])
@pytest.mark.parametrize("grad", [False, True])
def test_a_dense_ffn_is_one_op(tokens, grad, monkeypatch):
    block, fast_block = pair()
    called = []
    monkeypatch.setattr(
        "openmythos_kernels.nn.paths.dense_ffn.swiglu_ffn", lambda *a: called.append(1) or swiglu_ffn(*a)
    )
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(call(fast_block, tokens), call(block, tokens), rtol=1e-4, atol=1e-4)
    assert called


@torch.no_grad()
@pytest.mark.parametrize("part", ["attn_norm", "ffn_norm", "ffn", "ffn.up", "resid_drop"])
def test_hooks_on_parts_still_run(part):
    _, fast_block = pair()
    seen = []
    fast_block.get_submodule(part).register_forward_hook(lambda *a: seen.append(1))
    call(fast_block, 1)
    assert seen


def test_autocast_is_as_exact_as_the_reference():
    block, fast_block = pair()
    exact = call(copy.deepcopy(block).double(), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = call(block), call(fast_block)
    for a, b, true in zip(ours, eager, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative(a.detach(), true.detach()) <= 2 * relative(b.detach(), true.detach())


def test_dropout_equals_the_references():
    results = []
    for block in pair(dropout=0.5):
        block.train()
        results.append(call(block)[0])
    assert torch.equal(*results)


def test_fallback_has_a_reason():
    _, fast_block = pair()
    fast_block.attn_norm = nn.Identity()
    fast_block.attn_norm.weight = nn.Parameter(torch.ones(24))
    assert "attn_norm is not a plain RMSNorm" in fast_block.backend().reason
