"""The drop-in MLAttention against the reference module."""

import copy

import pytest
import torch
from torch import nn

from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.paths import mla_decode
from openmythos_kernels.runtime import extension
from openmythos_kernels.verify.budget import assert_within_budget
from tests.kit.compare import swapped
from tests.kit.dtypes import LOW
from tests.kit.mla import PLAIN, SIZES, filled_cache, reference, token

pytestmark = pytest.mark.usefixtures("needs_extension")


@torch.no_grad()
def test_a_cache_of_another_batch_or_dtype_is_refused():
    module = swapped(reference(PLAIN), MLAttention)
    x, freqs_cis, _ = token(module, (2, 2))
    for cache in (filled_cache(module, (2,), 8), filled_cache(reference(PLAIN, torch.float16), (2, 2), 8)):
        with pytest.raises(ValueError, match="kv_cache"):
            module(x, freqs_cis, CausalMask(2, 1), cache)


def refuse_decode(monkeypatch):
    def refused(*_):
        raise AssertionError("the op ran, though it must not")

    monkeypatch.setattr(mla_decode, "run", refused)


@torch.no_grad()
def test_a_cached_token_runs_as_one_op(monkeypatch):
    module = swapped(reference(PLAIN), MLAttention)
    assert module.backend().backend == "cpu"
    x, freqs_cis, mask = token(module, (2, 5))
    calls, run = [], mla_decode.run
    monkeypatch.setattr(mla_decode, "run", lambda call: calls.append(1) or run(call))
    module(x, freqs_cis, mask, filled_cache(module, (2, 5), capacity=8))
    assert calls == [1]


FALLBACKS = {
    "hook": lambda m: m.q_down.register_forward_hook(lambda *a: None),
    "pre-hook": lambda m: m.kv_norm.register_forward_pre_hook(lambda *a: None),
    "forward of its own": lambda m: setattr(m.wo, "forward", m.wo.forward),
    "subclass": lambda m: setattr(m.kv_up, "__class__", type("Adapter", (nn.Linear,), {})),
    "bias": lambda m: m.q_up_nope.register_parameter("bias", nn.Parameter(torch.randn(m.q_up_nope.out_features))),
    "other eps": lambda m: setattr(m.q_norm, "eps", 0.5),
    "mixed dtypes": lambda m: m.kv_norm.double(),
    "extension missing": None,
}


@pytest.mark.parametrize("case", FALLBACKS)
@torch.no_grad()
def test_parts_that_the_op_would_bypass_cause_a_fallback_with_a_reason(case, monkeypatch):
    module = reference(PLAIN)
    if case == "extension missing":
        monkeypatch.setattr(extension, "reason", "not built")
    else:
        FALLBACKS[case](module)
    fast = swapped(module, MLAttention)
    refuse_decode(monkeypatch)
    choice = fast.backend()
    assert not choice.fast and choice.reason
    if case == "mixed dtypes":
        return  # the reference cannot run such a layer either
    x, freqs_cis, mask = token(module, (2, 5))
    ours, eager = (m(x, freqs_cis, mask, widened_to_float(m)) for m in (fast, module))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def widened_to_float(module, lengths=(2, 5)):
    cache = filled_cache(module, lengths, capacity=8)
    for entry in cache.values():
        entry.tensors = {name: t.nan_to_num() for name, t in entry.tensors.items()}
    return cache


def test_global_hooks_cause_a_fallback():
    module = swapped(reference(PLAIN), MLAttention)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert "every module" in module.backend().reason
    finally:
        handle.remove()
    assert module.backend().fast


def test_calls_that_the_op_does_not_support_equal_the_reference(monkeypatch):
    module = reference(PLAIN)
    fast = swapped(module, MLAttention)
    refuse_decode(monkeypatch)
    x, freqs_cis, mask = token(module, (2, 5))
    tensor_mask = mask.additive(6, x)
    other_start = CausalMask([1, 3], 1)

    def same(mask, lengths=(2, 5), x=x, freqs_cis=freqs_cis):
        ours, eager = (m(x, freqs_cis, mask, widened_to_float(m, lengths)) for m in (fast, module))
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)

    same(mask)  # with gradients
    with torch.no_grad():
        same(tensor_mask)
        same(other_start)
        same(None)  # without a mask, shorter rows would attend to padding
        same(CausalMask([2, 5], 3), x=x.expand(-1, 3, -1), freqs_cis=freqs_cis.expand(-1, 3, -1))
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = (m(x, freqs_cis, mask, None) for m in (fast, module))
            torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)


def test_active_dropout_equals_the_references(monkeypatch):
    module = reference(PLAIN, dropout=0.5).train()
    fast = swapped(module, MLAttention)
    refuse_decode(monkeypatch)
    x, freqs_cis, mask = token(module, (2, 5))
    results = []
    for m in (module, fast):
        torch.manual_seed(5)
        with torch.no_grad():
            results.append(m(x, freqs_cis, mask, widened_to_float(m)))
    assert torch.equal(*results)


def run_with_gradients(module, x, freqs_cis, mask, upstream):
    x = x.detach().requires_grad_()
    y = module(x, freqs_cis, mask)
    grads = torch.autograd.grad(y, (x, *module.parameters()), upstream.to(y.dtype))
    return dict(zip(("y", "x", *(name for name, _ in module.named_parameters())), (y, *grads)))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", ["plain", "odd", "two vectors of heads"])
def test_training_stays_within_the_error_budget(sizes, dtype):
    module = reference(SIZES[sizes], dtype)
    T = 37
    table = rotary_table(module.qk_rope_dim, T, 100.0)
    for mask in (CausalMask(0, T), None):
        fast, eager, exact = [], [], []
        for _ in range(4):  # judged together, since the largest error of one draw is random
            x = torch.randn(2, T, module.wo.out_features).to(dtype)
            upstream = torch.randn_like(x)
            fast.append(run_with_gradients(swapped(module, MLAttention), x, table, mask, upstream))
            eager.append(run_with_gradients(module, x, table, mask, upstream))
            exact.append(run_with_gradients(copy.deepcopy(module).double(), x.double(), table, mask, upstream.double()))
        assert_within_budget(
            *({name: torch.stack([r[name] for r in runs]) for name in runs[0]} for runs in (fast, eager, exact))
        )


def test_norms_of_another_dtype_train_like_the_reference():
    module = reference(PLAIN, torch.bfloat16)
    module.q_norm.float()
    module.kv_norm.float()
    table = rotary_table(module.qk_rope_dim, 9, 100.0)
    x = torch.randn(2, 9, module.wo.out_features).bfloat16()
    modules = swapped(module, MLAttention), module
    found, expected = (run_with_gradients(m, x, table, CausalMask(0, 9), torch.ones_like(x)) for m in modules)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.05 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_chunked_prompts_stay_within_the_error_budget(dtype):
    module = reference(PLAIN, dtype)
    table = rotary_table(module.qk_rope_dim, 64, 100.0)
    x = torch.randn(2, 33, module.wo.out_features).to(dtype)
    outputs = []
    for m, inputs in ((swapped(module, MLAttention), x), (module, x), (copy.deepcopy(module).double(), x.double())):
        cache: dict = {}
        chunks = [m(inputs[:, a:b], table[a:b], CausalMask(a, b - a), cache) for a, b in ((0, 7), (7, 20), (20, 33))]
        cache["default"].truncate([33, 21])  # unequal lengths from here on
        mask, freqs_cis = CausalMask([33, 21], 4), torch.stack((table[33:37], table[21:25]))
        outputs.append(torch.cat([*chunks, m(inputs[:, :4], freqs_cis, mask, cache)], 1))
    assert_within_budget(*outputs)


def test_autocast_training_stays_within_the_error_budget():
    module = reference(PLAIN)
    x = torch.randn(2, 19, module.wo.out_features)
    upstream = torch.randn_like(x)
    table = rotary_table(module.qk_rope_dim, 19, 100.0)
    results = []
    for m in (swapped(module, MLAttention), module):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run_with_gradients(m, x, table, CausalMask(0, 19), upstream))
    exact = run_with_gradients(copy.deepcopy(module).double(), x.double(), table, CausalMask(0, 19), upstream.double())
    assert_within_budget(*results, exact, dtype=torch.bfloat16)
