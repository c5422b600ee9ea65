"""What a latent-attention layer saves for its backward, and training that recomputes from the latents."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import openmythos
from benchmarks.suites.mla import peak_bytes
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels import nn as fast
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.paths import mla_recompute
from openmythos_kernels.nn.thresholds import threshold
from tests.kit.compare import swapped
from tests.kit.tiny import enliven, tiny_config

pytestmark = pytest.mark.usefixtures("always_recompute")

SIZES = dict(dim=48, n_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
TOKENS = 500
KEPT = 4 * (32 + 8 + 24) + 8 * 4  # bytes per token in float32: latents and rotary key, and at most two numbers per head


def layer(recompute):
    torch.manual_seed(0)
    module = swapped(enliven(openmythos.MLAttention(tiny_config(**SIZES))), fast.MLAttention)
    module.recompute = recompute
    return module


def arguments(tokens=TOKENS):
    torch.manual_seed(1)
    return torch.randn(2, tokens, 48, requires_grad=True), rotary_table(8, tokens, 1e4), CausalMask(0, tokens)


def held(module):
    """Bytes that a forward allocates and does not free, except for its result."""
    given = arguments()
    module(*given)  # so that one-time allocations do not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = module(*given)
    events = recorded.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]") - y.nbytes


def test_only_latents_are_saved():
    limit = 2 * TOKENS * KEPT + 8 * TOKENS * 8  # plus the rotary table, which all rows share
    assert held(layer(True)) <= limit < held(layer(False)) / 3


def test_large_calls_recompute_by_default(monkeypatch):
    monkeypatch.undo()
    module, bytes_a_row = layer(fast.MLAttention.recompute), 4 * 4 * (16 + 8 + 16 + 16 + 16)
    enough = -(-threshold("mla_recompute") // bytes_a_row)
    freqs = torch.ones(enough, 8, dtype=torch.complex64)

    def refused(tokens):
        return mla_recompute.refuses(LayerCall(module, torch.empty(1, tokens, 48), freqs, None, None, "default"))

    assert not refused(enough) and "too small" in refused(enough - 1)


def test_the_same_gradients():
    """The gradients have the same bits, except for the output projection, whose input is computed differently."""
    results = []
    for recompute in (False, True):
        module, (x, *rest) = layer(recompute), arguments()
        y = module(x, *rest)
        names, weights = zip(*module.named_parameters())
        grads = torch.autograd.grad(y.sin().sum(), (x, *weights))
        results.append(dict(zip(("y", "x", *names), (y, *grads))))
    kept, made_again = results
    for name, value in kept.items():
        tolerance = 1e-5 if name == "wo.weight" else 0
        torch.testing.assert_close(made_again[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


@pytest.mark.parametrize("frozen", ["q_norm", "kv_up", "wo", "q_up_nope"])
def test_frozen_weights(frozen):
    results = []
    for recompute in (False, True):
        module, (x, *rest) = layer(recompute), arguments(20)
        getattr(module, frozen).weight.requires_grad_(False)
        module(x, *rest).sin().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for kept, made_again in zip(*results, strict=True):
        assert (kept is None) == (made_again is None)
        if kept is not None:
            torch.testing.assert_close(made_again, kept, rtol=1e-5, atol=1e-5 * float(kept.abs().max()))


def test_a_weight_changed_in_between_is_refused():
    module, given = layer(True), arguments(20)
    y = module(*given)
    with torch.no_grad():
        module.kv_up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_fire_once():
    module, given, seen = layer(True), arguments(20), []
    module.kv_up.register_forward_hook(lambda *_: seen.append(1))
    module(*given).sum().backward()
    assert len(seen) == 1


def test_other_weights_for_one_call():
    """`functional_call` has restored the module's weights when the backward runs, and autograd does not record frozen
    ones."""
    results = []
    for recompute in (False, True):
        module, given = layer(recompute), arguments(20)
        others = {name: 1.5 * p.detach() for name, p in module.named_parameters()}
        others["kv_norm.weight"].requires_grad_()
        torch.func.functional_call(module, others, given).sin().sum().backward()
        results.append((given[0].grad, others["kv_norm.weight"].grad))
    for kept, made_again in zip(*results, strict=True):
        torch.testing.assert_close(made_again, kept, rtol=1e-5, atol=1e-5 * float(kept.abs().max()))


def test_torch_func_grad():
    module, (x, *rest) = layer(True), arguments(20)
    (expected,) = torch.autograd.grad(module(x, *rest).sin().sum(), x)
    torch.testing.assert_close(
        torch.func.grad(lambda x: module(x, *rest).sin().sum())(x.detach()), expected, rtol=1e-5, atol=1e-5
    )


def test_memory_grows_linearly_with_tokens():
    def step(tokens):
        module, given = layer(False), arguments(tokens)
        return lambda: module(*given).sum().backward()

    short, long = (peak_bytes(step(tokens)) for tokens in (600, 2400))
    assert long < 4.2 * short


@pytest.mark.parametrize("case", ["no gradients", "a cache"])
def test_calls_that_save_nothing_do_not_recompute(case, monkeypatch):
    monkeypatch.setattr(
        "openmythos_kernels.nn.paths.mla_recompute.MLARecompute.apply", lambda *a: pytest.fail("recomputes")
    )
    x, freqs, mask = arguments()
    with torch.set_grad_enabled(case != "no gradients"):
        layer(True)(x, freqs, mask, {} if case == "a cache" else None)
