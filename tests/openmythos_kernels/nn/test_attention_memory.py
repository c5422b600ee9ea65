"""What a latent-attention layer holds between its forward and its backward, and training from the latents alone."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import openmythos
from benchmarks.suites.mla import peak_bytes
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels import nn as fast
from tests.kit.tiny import enliven, tiny_config

SIZES = dict(dim=48, n_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
TOKENS = 500
KEPT = 4 * (32 + 8 + 24) + 8 * 4  # bytes a token in float32: latents and rotary key, and two numbers a head at most


def layer(recompute):
    torch.manual_seed(0)
    module = enliven(openmythos.MLAttention(tiny_config(**SIZES)))
    module.__class__ = fast.MLAttention
    module.recompute = recompute
    return module


def arguments(tokens=TOKENS):
    torch.manual_seed(1)
    return torch.randn(2, tokens, 48, requires_grad=True), rotary_table(8, tokens, 1e4), CausalMask(0, tokens)


def held(module):
    """Bytes that a forward allocates and does not free, its result's left out."""
    given = arguments()
    module(*given)  # whatever is allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = module(*given)
    events = recorded.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]") - y.nbytes


def test_only_the_latents_are_kept():
    limit = 2 * TOKENS * KEPT + 8 * TOKENS * 8  # and the angles, which all rows share
    assert held(layer(True)) <= limit < held(layer(False)) / 3


def test_the_same_bits():
    results = []
    for recompute in (False, True):
        module, (x, *rest) = layer(recompute), arguments()
        y = module(x, *rest)
        results.append([y, *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))])
    for kept, made_again in zip(*results, strict=True):
        assert torch.equal(kept, made_again)


def test_memory_grows_as_the_tokens():
    def step(tokens):
        module, given = layer(False), arguments(tokens)
        return lambda: module(*given).sum().backward()

    short, long = (peak_bytes(step(tokens)) for tokens in (600, 2400))
    assert long < 4.2 * short


@pytest.mark.parametrize("case", ["no gradients", "a cache"])
def test_nothing_is_made_again_where_nothing_is_kept(case, monkeypatch):
    monkeypatch.setattr("openmythos_kernels.nn.attention.checkpoint", lambda *a, **k: pytest.fail("checkpointed"))
    x, freqs, mask = arguments()
    with torch.set_grad_enabled(case != "no gradients"):
        layer(True)(x, freqs, mask, {} if case == "a cache" else None)
