"""The mla_decode op and the drop-in MLAttention against the reference module."""

import copy

import pytest
import torch
from torch import nn

import openmythos
from openmythos.attention import CausalMask
from openmythos.cache import LayerCache
from openmythos.layers import rotary_table
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.paths import mla_decode as mla_decode_path
from openmythos_kernels.ops.mla import decode, mla_decode
from openmythos_kernels.runtime import extension
from openmythos_kernels.verify.budget import assert_within_budget, pooled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q_down", "q_norm", "q_up_nope", "q_up_rope", "kv_down", "kv_norm", "kv_up", "wo")

# dim, n_heads, kv_lora_rank, q_lora_rank, nope, rope, v
PLAIN = (32, 8, 32, 24, 16, 8, 16)
SIZES = {
    "plain": PLAIN,
    "one head": (20, 1, 24, 8, 4, 2, 8),
    "odd": (33, 3, 21, 11, 5, 6, 7),
    "two vectors of heads": (24, 17, 40, 9, 3, 2, 5),
    "five heads, width one": (16, 5, 1, 1, 1, 2, 1),
}


@pytest.fixture(autouse=True, scope="module")
def needs_extension():
    assert extension.module is not None, extension.reason


def reference(sizes, dtype=torch.float32, dropout=0.0, seed=0):
    """A reference layer with weights of unit gain, so that softmax is far from uniform."""
    torch.manual_seed(seed)
    dim, heads, r, q_rank, nope, rope, v = sizes
    cfg = openmythos.MythosConfig(
        dim=dim * heads,
        n_heads=heads,
        n_kv_heads=heads,
        kv_lora_rank=r,
        q_lora_rank=q_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
        attn_type="mla",
        dropout=dropout,
    )
    module = openmythos.MLAttention(cfg)
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.2) if p.dim() == 1 else nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5)
    return module.to(dtype).eval()


def swapped(module):
    fast = copy.deepcopy(module)
    fast.__class__ = MLAttention
    return fast


def filled_cache(module, lengths, capacity, seed=1):
    """A cache whose rows hold `lengths` tokens, NaN behind them."""
    torch.manual_seed(seed)
    entry = LayerCache()
    dtype = module.wo.weight.dtype
    for name, width in (("latent", module.kv_lora_rank), ("k_rope", module.qk_rope_dim)):
        held = torch.randn(len(lengths), capacity, width).to(dtype)
        for b, n in enumerate(lengths):
            held[b, n:] = float("nan")
        entry.tensors[name] = held
    entry.lengths = list(lengths)
    return {"default": entry}


def token(module, lengths, seed=2):
    """x, freqs_cis and mask of one new token per row."""
    torch.manual_seed(seed)
    table = rotary_table(module.qk_rope_dim, max(lengths) + 1, 100.0)
    x = torch.randn(len(lengths), 1, module.wo.out_features).to(module.wo.weight.dtype)
    return x, table[torch.tensor(lengths)].unsqueeze(1), CausalMask(list(lengths), 1)


def widened(cache):
    """The cache in float64, its NaN replaced by zeros: the reference multiplies what it hides by 0."""
    out = copy.deepcopy(cache)
    for entry in out.values():
        entry.tensors = {name: t.double().nan_to_num() for name, t in entry.tensors.items()}
    return out


def op_args(module, cache, x, freqs_cis):
    """Arguments of `mla_decode`, in its order."""
    entry = cache["default"]
    return (
        x.squeeze(1),
        torch.view_as_real(freqs_cis).flatten(0, 1),
        *entry.tensors.values(),
        torch.tensor(entry.lengths),
        *(getattr(module, name).weight.detach() for name in NAMES),
        module.n_heads,
        module.qk_nope_dim,
        module.qk_rope_dim,
        module.v_dim,
        module.q_norm.eps,
    )


def named_args(module, cache, x, freqs_cis):
    """The same for the public function: positional ones and named ones."""
    args = op_args(module, cache, x, freqs_cis)
    return args[:5], dict(zip((*NAMES, "n_heads", "nope", "rope", "v", "eps"), args[5:]))


def refuse_decode(monkeypatch):
    def refused(*_):
        raise AssertionError("the op ran where it must not")

    monkeypatch.setattr(mla_decode_path, "run", refused)


# Rows of unequal length, the empty one included; below, at and above the tile of 16 and the task of 128 keys.
LENGTHS = [(0,), (1, 0), (6, 7, 8), (14, 15, 16), (31, 47), (126, 127, 128), (0, 300, 129)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_decode_stays_within_the_error_budget(sizes, dtype):
    draws = [decoded(sizes, dtype, lengths, seed) for lengths in LENGTHS for seed in range(3)]
    assert_within_budget(*(pooled(draw) for draw in zip(*draws)))


def decoded(sizes, dtype, lengths, seed):
    """Output and what was appended to the cache: by the op, by the reference, by the reference in float64."""
    module = reference(sizes, dtype, seed=seed)
    exact, fast = copy.deepcopy(module).double(), swapped(module)
    x, freqs_cis, mask = token(module, lengths, seed=seed)
    cache = filled_cache(module, lengths, capacity=max(lengths) + 3, seed=seed + 1)
    want, eager_cache = widened(cache), widened(cache)
    for entry in eager_cache.values():
        entry.tensors = {name: t.to(dtype) for name, t in entry.tensors.items()}
    ours = fast(x, freqs_cis, mask, cache)
    eager = module(x, freqs_cis, mask, eager_cache)
    truth = exact(x.double(), freqs_cis, mask, want)
    assert cache["default"].lengths == [n + 1 for n in lengths]
    return [
        {"y": y} | {name: c["default"].tensors[name][range(len(lengths)), lengths] for name in ("latent", "k_rope")}
        for y, c in ((ours, cache), (eager, eager_cache), (truth, want))
    ]


@torch.no_grad()
def test_decode_touches_the_cache_only_at_the_new_token():
    lengths = (5, 0, 40)
    module = reference(PLAIN)
    x, freqs_cis, mask = token(module, lengths)
    cache = filled_cache(module, lengths, capacity=64)
    before = {name: t.clone() for name, t in cache["default"].tensors.items()}
    y = swapped(module)(x, freqs_cis, mask, cache)
    assert y.isfinite().all()
    for name, held in cache["default"].tensors.items():
        for b, n in enumerate(lengths):
            assert held[b, n].isfinite().all()
            held[b, n] = before[name][b, n]
        assert torch.equal(held.nan_to_num(nan=7.0), before[name].nan_to_num(nan=7.0))


@torch.no_grad()
def test_float64_decode_equals_the_reference_step_by_step():
    module = reference(PLAIN, torch.float64)
    fast = swapped(module)
    table = rotary_table(module.qk_rope_dim, 64, 100.0)
    x = torch.randn(2, 45, module.wo.out_features, dtype=torch.float64)
    caches = {}, {}
    outputs = [[m(x[:, :9], table[:9], CausalMask(0, 9), c)] for m, c in zip((module, fast), caches)]
    for t in range(9, 45):  # the cache grows twice on the way
        mask = CausalMask(t, 1) if t % 2 else None
        for m, c, out in zip((module, fast), caches, outputs):
            out.append(m(x[:, t : t + 1], table[t : t + 1], mask, c))
    torch.testing.assert_close(torch.cat(outputs[1], 1), torch.cat(outputs[0], 1), rtol=1e-12, atol=1e-12)
    assert caches[1]["default"].lengths == caches[0]["default"].lengths == [45, 45]
    whole = module(x, table[:45], CausalMask(0, 45))
    torch.testing.assert_close(torch.cat(outputs[1], 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    module = reference(SIZES["odd"], dtype)
    lengths = (700, 3, 129)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            x, freqs_cis, mask = token(module, lengths)
            cache = filled_cache(module, lengths, capacity=704)
            with torch.no_grad():
                results.append(swapped(module)(x, freqs_cis, mask, cache))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], y) for y in results[1:])


@torch.no_grad()
def test_a_cache_of_another_batch_or_dtype_is_refused():
    module = swapped(reference(PLAIN))
    x, freqs_cis, _ = token(module, (2, 2))
    for cache in (filled_cache(module, (2,), 8), filled_cache(swapped(reference(PLAIN, torch.float16)), (2, 2), 8)):
        with pytest.raises(ValueError, match="kv_cache"):
            module(x, freqs_cis, CausalMask(2, 1), cache)


@torch.no_grad()
def test_rows_do_not_influence_each_other():
    module, lengths = swapped(reference(SIZES["odd"])), (130, 3, 40)
    x, freqs_cis, mask = token(module, lengths)
    cache = filled_cache(module, lengths, capacity=140)
    alone = []
    for b, n in enumerate(lengths):
        entry = LayerCache()
        entry.tensors = {name: t[b : b + 1].clone() for name, t in cache["default"].tensors.items()}
        entry.lengths = [n]
        alone.append(module(x[b : b + 1], freqs_cis[b : b + 1], CausalMask(n, 1), {"default": entry}))
    torch.testing.assert_close(module(x, freqs_cis, mask, cache), torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inputs_may_be_strided_and_caches_may_have_gaps_between_rows():
    module, lengths = reference(SIZES["odd"]), (5, 2)
    x, freqs_cis, _ = token(module, lengths)
    cache = filled_cache(module, lengths, capacity=9)
    positional, named = named_args(module, cache, x, freqs_cis)
    want = decode(*(t.clone() for t in positional), **named)
    x, freqs, *caches, held = positional
    gaps = [torch.full((2, t.shape[1] + 4, t.shape[2]), float("nan")) for t in caches]
    for gap, t in zip(gaps, caches):
        gap[:, : t.shape[1]] = t
    views = [gap[:, : t.shape[1]] for gap, t in zip(gaps, caches)]
    strided = {
        name: v.t().contiguous().t() if isinstance(v, torch.Tensor) and v.dim() == 2 else v for name, v in named.items()
    }
    got = decode(x.repeat(1, 2)[:, : x.shape[1]], freqs.expand(2, -1, -1), *views, held.repeat(2)[:2], **strided)
    assert torch.equal(got, want)
    assert all(gap[:, t.shape[1] :].isnan().all() for gap, t in zip(gaps, caches))


def test_no_rows():
    module = reference(PLAIN)
    cache = filled_cache(module, (), capacity=4)
    x = torch.empty(0, 1, module.wo.out_features)
    positional, named = named_args(module, cache, x, torch.empty(0, 1, 4, dtype=torch.complex64))
    assert decode(*positional[:4], torch.empty(0, dtype=torch.int64), **named).shape == (0, x.shape[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    module, lengths = reference(SIZES["odd"], dtype), (3, 0)
    x, freqs_cis, _ = token(module, lengths)
    cache = filled_cache(module, lengths, capacity=5)
    for held in cache["default"].tensors.values():
        held.nan_to_num_()  # opcheck compares caches, and NaN equals nothing
    torch.library.opcheck(mla_decode.overload, op_args(module, cache, x, freqs_cis))


def test_compiled_equals_eager():
    module, lengths = reference(PLAIN), (3, 0)
    x, freqs_cis, _ = token(module, lengths)
    caches = [filled_cache(module, lengths, capacity=5) for _ in range(2)]
    calls = decode, torch.compile(decode, fullgraph=True, backend="aot_eager")
    results = []
    for call, cache in zip(calls, caches):
        positional, named = named_args(module, cache, x, freqs_cis)
        results.append(call(*positional, **named))
    assert torch.equal(*results)
    for name in ("latent", "k_rope"):
        a, b = (c["default"].tensors[name].nan_to_num(nan=7.0) for c in caches)
        assert torch.equal(a, b)


WRONG = {
    "x": lambda a: a.update(x=a["x"][0]),
    "x dtype": lambda a: a.update(x=a["x"].int()),
    "latent_cache": lambda a: a.update(latent_cache=a["latent_cache"].transpose(1, 2)),
    "rope_cache": lambda a: a.update(rope_cache=a["rope_cache"][:, :3]),
    "latent_cache dtype": lambda a: a.update(latent_cache=a["latent_cache"].double()),
    "rope_cache strides": lambda a: a.update(rope_cache=a["rope_cache"].repeat(1, 1, 2)[..., ::2]),
    "lengths": lambda a: a.update(lengths=a["lengths"].int()),
    "lengths of a full cache": lambda a: a.update(lengths=torch.tensor([5, 0])),
    "lengths below zero": lambda a: a.update(lengths=torch.tensor([0, -1])),
    "freqs": lambda a: a.update(freqs=a["freqs"][:, :1]),
    "freqs dtype": lambda a: a.update(freqs=a["freqs"].double()),
    "q_down": lambda a: a.update(q_down=a["q_down"][:, 1:]),
    "kv_up": lambda a: a.update(kv_up=a["kv_up"][1:]),
    "wo": lambda a: a.update(wo=a["wo"].double()),
    "n_heads": lambda a: a.update(n_heads=0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_are_named(wrong):
    module, lengths = reference(PLAIN), (3, 0)
    x, freqs_cis, _ = token(module, lengths)
    positional, named = named_args(module, filled_cache(module, lengths, capacity=5), x, freqs_cis)
    args = dict(zip(("x", "freqs", "latent_cache", "rope_cache", "lengths"), positional), **named)
    WRONG[wrong](args)
    with pytest.raises(ValueError, match=wrong.split()[0]):
        decode(**args)


# ---- the module ----


@torch.no_grad()
def test_a_cached_token_runs_as_one_op(monkeypatch):
    module = swapped(reference(PLAIN))
    assert module.backend().backend == "cpu"
    x, freqs_cis, mask = token(module, (2, 5))
    calls, run = [], mla_decode_path.run
    monkeypatch.setattr(mla_decode_path, "run", lambda call: calls.append(1) or run(call))
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
def test_what_the_op_would_bypass_falls_back_and_says_why(case, monkeypatch):
    module = reference(PLAIN)
    if case == "extension missing":
        monkeypatch.setattr(extension, "reason", "not built")
    else:
        FALLBACKS[case](module)
    fast = swapped(module)
    refuse_decode(monkeypatch)
    choice = fast.backend()
    assert not choice.fast and choice.reason
    if case == "mixed dtypes":
        return  # the reference refuses such a layer as well
    x, freqs_cis, mask = token(module, (2, 5))
    ours, eager = (m(x, freqs_cis, mask, widened_to_float(m)) for m in (fast, module))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def widened_to_float(module, lengths=(2, 5)):
    cache = filled_cache(module, lengths, capacity=8)
    for entry in cache.values():
        entry.tensors = {name: t.nan_to_num() for name, t in entry.tensors.items()}
    return cache


def test_global_hooks_fall_back():
    module = swapped(reference(PLAIN))
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert "every module" in module.backend().reason
    finally:
        handle.remove()
    assert module.backend().fast


def test_calls_the_op_cannot_serve_match_the_reference(monkeypatch):
    module = reference(PLAIN)
    fast = swapped(module)
    refuse_decode(monkeypatch)
    x, freqs_cis, mask = token(module, (2, 5))
    tensor_mask = mask.additive(6, x)
    other_start = CausalMask([1, 3], 1)

    def same(mask, lengths=(2, 5), x=x, freqs_cis=freqs_cis):
        ours, eager = (m(x, freqs_cis, mask, widened_to_float(m, lengths)) for m in (fast, module))
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)

    same(mask)  # gradients are on
    with torch.no_grad():
        same(tensor_mask)
        same(other_start)
        same(None)  # rows of unequal length: nothing hidden is not what decode means
        same(CausalMask([2, 5], 3), x=x.expand(-1, 3, -1), freqs_cis=freqs_cis.expand(-1, 3, -1))
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = (m(x, freqs_cis, mask, None) for m in (fast, module))
            torch.testing.assert_close(ours, eager, rtol=0.05, atol=0.05)


def test_active_dropout_is_the_references(monkeypatch):
    module = reference(PLAIN, dropout=0.5).train()
    fast = swapped(module)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", ["plain", "odd", "two vectors of heads"])
def test_training_stays_within_the_error_budget(sizes, dtype):
    module = reference(SIZES[sizes], dtype)
    T = 37
    table = rotary_table(module.qk_rope_dim, T, 100.0)
    for mask in (CausalMask(0, T), None):
        fast, eager, exact = [], [], []
        for _ in range(4):  # judged together: one draw's largest errors are luck
            x = torch.randn(2, T, module.wo.out_features).to(dtype)
            upstream = torch.randn_like(x)
            fast.append(run_with_gradients(swapped(module), x, table, mask, upstream))
            eager.append(run_with_gradients(module, x, table, mask, upstream))
            exact.append(run_with_gradients(copy.deepcopy(module).double(), x.double(), table, mask, upstream.double()))
        assert_within_budget(
            *({name: torch.stack([r[name] for r in runs]) for name in runs[0]} for runs in (fast, eager, exact))
        )


def test_norms_of_another_dtype_train_as_in_the_reference():
    module = reference(PLAIN, torch.bfloat16)
    module.q_norm.float()
    module.kv_norm.float()
    table = rotary_table(module.qk_rope_dim, 9, 100.0)
    x = torch.randn(2, 9, module.wo.out_features).bfloat16()
    found, expected = (
        run_with_gradients(m, x, table, CausalMask(0, 9), torch.ones_like(x)) for m in (swapped(module), module)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.05 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_chunked_prompts_stay_within_the_error_budget(dtype):
    module = reference(PLAIN, dtype)
    table = rotary_table(module.qk_rope_dim, 64, 100.0)
    x = torch.randn(2, 33, module.wo.out_features).to(dtype)
    outputs = []
    for m, inputs in ((swapped(module), x), (module, x), (copy.deepcopy(module).double(), x.double())):
        cache: dict = {}
        chunks = [m(inputs[:, a:b], table[a:b], CausalMask(a, b - a), cache) for a, b in ((0, 7), (7, 20), (20, 33))]
        cache["default"].truncate([33, 21])  # rows of unequal length from here on
        mask, freqs_cis = CausalMask([33, 21], 4), torch.stack((table[33:37], table[21:25]))
        outputs.append(torch.cat([*chunks, m(inputs[:, :4], freqs_cis, mask, cache)], 1))
    assert_within_budget(*outputs)


def test_autocast_training_stays_within_the_error_budget():
    module = reference(PLAIN)
    x = torch.randn(2, 19, module.wo.out_features)
    upstream = torch.randn_like(x)
    table = rotary_table(module.qk_rope_dim, 19, 100.0)
    results = []
    for m in (swapped(module), module):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run_with_gradients(m, x, table, CausalMask(0, 19), upstream))
    exact = run_with_gradients(copy.deepcopy(module).double(), x.double(), table, CausalMask(0, 19), upstream.double())
    assert_within_budget(*results, exact, dtype=torch.bfloat16)
