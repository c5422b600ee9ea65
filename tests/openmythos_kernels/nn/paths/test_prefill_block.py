"""Prefill without gradients: a block's attention and its dense feed-forward layer as one op on a CPU."""

import copy

import pytest
import torch

from openmythos.attention import CausalMask
from openmythos.block import TransformerBlock
from openmythos.layers import rotary_table
from openmythos_kernels import nn as fast
from openmythos_kernels.nn.paths import mla_decode, prefill_block
from openmythos_kernels.ops.layer import block_prompt
from tests.kit.threads import threads
from tests.kit.tiny import enliven, tiny_config

CAUSAL = CausalMask(0, 6)
PARTS = [
    "attn_norm",
    "attn",
    "attn.q_down",
    "attn.kv_norm",
    "attn.attn_drop",
    "ffn_norm",
    "ffn",
    "ffn.up",
    "resid_drop",
]


def pair(use_moe=False, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    block = enliven(TransformerBlock(tiny_config(**fields), use_moe)).to(dtype).eval()
    swapped = copy.deepcopy(block)
    for module in swapped.modules():
        module.__class__ = getattr(fast, type(module).__name__, type(module))
    return block, swapped


def call(block, mask=CAUSAL, rows=4, tokens=6, cache=None):
    torch.manual_seed(1)
    x = torch.randn(rows, tokens, 24).to(block.attn_norm.weight.dtype)
    return block(x, rotary_table(4, tokens, 100.0), mask, cache)


@pytest.fixture
def used(monkeypatch):
    calls = []
    monkeypatch.setattr(prefill_block, "block_prompt", lambda *a, **k: calls.append(1) or block_prompt(*a, **k))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["all", "causal"])
def test_output_equals_the_reference(used, use_moe, rows, mask):
    block, swapped = pair(use_moe)
    first = call(swapped, mask, rows)
    torch.testing.assert_close(first, call(block, mask, rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(call(swapped, mask, rows), first) and used == [1, 1]


def test_any_number_of_threads(used):
    block, swapped = pair()
    mask = CausalMask(0, 40)
    for number in (1, 2, 3, 7):
        with torch.no_grad(), threads(number):
            torch.testing.assert_close(call(swapped, mask, 6, 40), call(block, mask, 6, 40), rtol=1e-5, atol=1e-5)
    assert len(used) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    "mask",
    [CausalMask(3, 6), CausalMask([0, 1, 2, 3], 6), torch.zeros(6, 6).triu(1) * -1e9],
    ids=["later", "own", "tensor"],
)
def test_other_masks_take_another_path(used, mask):
    block, swapped = pair()
    torch.testing.assert_close(call(swapped, mask), call(block, mask), rtol=1e-5, atol=1e-5)
    assert not used


def test_gradients_caches_other_dtypes_and_autocast_take_another_path(used):
    block, swapped = pair()
    assert call(swapped).requires_grad
    with torch.no_grad():
        caches = {}, {}
        torch.testing.assert_close(call(swapped, cache=caches[0]), call(block, cache=caches[1]), rtol=1e-5, atol=1e-5)
        assert caches[0].keys() == caches[1].keys()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(call(swapped), call(block), rtol=0.05, atol=0.05)
        for dtype in (torch.float64, torch.bfloat16):
            block, swapped = pair(dtype=dtype)
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
            torch.testing.assert_close(call(swapped), call(block), rtol=tolerance, atol=tolerance)
    assert not used


@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_parts_still_run(part):
    _, swapped = pair()
    seen = []
    swapped.get_submodule(part).register_forward_hook(lambda *a: seen.append(1))
    call(swapped)
    assert seen


def test_dropout_equals_the_references(used):
    results = []
    with torch.no_grad():
        for block in pair(dropout=0.5):
            results.append(call(block.train()))
    assert torch.equal(*results) and not used


def test_transposed_weights(used):
    block, swapped = pair()
    with torch.no_grad():
        for linear in (swapped.attn.wo, swapped.ffn.down):
            linear.weight = torch.nn.Parameter(linear.weight.t().contiguous().t())
        torch.testing.assert_close(call(swapped), call(block), rtol=1e-5, atol=1e-5)
    assert used


def test_bad_input_is_one_clear_error():
    _, swapped = pair()
    weights, sizes = mla_decode.weights(swapped.attn)
    attention = [swapped.attn_norm.weight, *weights.values(), swapped.ffn_norm.weight]
    x, freqs = torch.randn(2, 6, 24), torch.view_as_real(rotary_table(4, 6, 100.0)).unsqueeze(0)
    good = dict(x=x, freqs=freqs, attention=attention, ffn=[], **sizes, eps=[1e-6] * 3, causal=True)
    with torch.no_grad():
        for match, wrong in (
            (r"x must be \(B, T, D\) float32", dict(x=x.double())),
            ("freqs", dict(freqs=freqs[:, :5])),
            ("attention: got 9 tensors", dict(attention=attention[1:])),
            ("wo", dict(attention=[*attention[:8], attention[8][1:], attention[9]])),
            ("ffn: got 1 tensors", dict(ffn=attention[:1])),
            ("down", dict(ffn=[torch.randn(7, 24), torch.randn(7, 24), torch.randn(24, 8)])),
            ("rope even", dict(rope=3)),
            ("eps: got 2 numbers", dict(eps=[1e-6] * 2)),
        ):
            with pytest.raises(ValueError, match=match):
                block_prompt(**good | wrong)
