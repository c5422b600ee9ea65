"""The mla_decode op against the reference module."""

import copy

import pytest
import torch

from openmythos.attention import CausalMask
from openmythos.cache import LayerCache
from openmythos.layers import rotary_table
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.ops.mla import decode, mla_decode
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from tests.kit.compare import swapped
from tests.kit.dtypes import LOW
from tests.kit.mla import PLAIN, SIZES, filled_cache, named_args, op_args, reference, token, widened
from tests.kit.threads import for_each_number

pytestmark = pytest.mark.usefixtures("needs_extension")

# Unequal lengths, including 0; below, at and above the tile of 16 keys and the task of 128 keys.
LENGTHS = [(0,), (1, 0), (6, 7, 8), (14, 15, 16), (31, 47), (126, 127, 128), (0, 300, 129)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_decode_stays_within_the_error_budget(sizes, dtype):
    draws = [decoded(sizes, dtype, lengths, seed) for lengths in LENGTHS for seed in range(3)]
    assert_within_budget(*(pooled(draw) for draw in zip(*draws)))


def decoded(sizes, dtype, lengths, seed):
    """Output and appended cache entries: of the op, of the reference, and of the reference in float64."""
    module = reference(sizes, dtype, seed=seed)
    exact, fast = copy.deepcopy(module).double(), swapped(module, MLAttention)
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
    y = swapped(module, MLAttention)(x, freqs_cis, mask, cache)
    assert y.isfinite().all()
    for name, held in cache["default"].tensors.items():
        for b, n in enumerate(lengths):
            assert held[b, n].isfinite().all()
            held[b, n] = before[name][b, n]
        assert torch.equal(held.nan_to_num(nan=7.0), before[name].nan_to_num(nan=7.0))


@torch.no_grad()
def test_float64_decode_equals_the_reference_step_by_step():
    module = reference(PLAIN, torch.float64)
    fast = swapped(module, MLAttention)
    table = rotary_table(module.qk_rope_dim, 64, 100.0)
    x = torch.randn(2, 45, module.wo.out_features, dtype=torch.float64)
    caches = {}, {}
    outputs = [[m(x[:, :9], table[:9], CausalMask(0, 9), c)] for m, c in zip((module, fast), caches)]
    for t in range(9, 45):  # the cache grows twice
        mask = CausalMask(t, 1) if t % 2 else None
        for m, c, out in zip((module, fast), caches, outputs):
            out.append(m(x[:, t : t + 1], table[t : t + 1], mask, c))
    torch.testing.assert_close(torch.cat(outputs[1], 1), torch.cat(outputs[0], 1), rtol=1e-12, atol=1e-12)
    assert caches[1]["default"].lengths == caches[0]["default"].lengths == [45, 45]
    whole = module(x, table[:45], CausalMask(0, 45))
    torch.testing.assert_close(torch.cat(outputs[1], 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    module = reference(SIZES["odd"], dtype)
    lengths = (700, 3, 129)

    @torch.no_grad()
    def decoded_once():
        x, freqs_cis, mask = token(module, lengths)
        cache = filled_cache(module, lengths, capacity=704)
        return swapped(module, MLAttention)(x, freqs_cis, mask, cache)

    results = for_each_number((1, 2, 3, 2), decoded_once)
    assert all(torch.equal(results[0], y) for y in results[1:])


@torch.no_grad()
def test_rows_do_not_influence_each_other():
    module, lengths = swapped(reference(SIZES["odd"]), MLAttention), (130, 3, 40)
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


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_opcheck(dtype):
    module, lengths = reference(SIZES["odd"], dtype), (3, 0)
    x, freqs_cis, _ = token(module, lengths)
    cache = filled_cache(module, lengths, capacity=5)
    for held in cache["default"].tensors.values():
        held.nan_to_num_()  # opcheck compares caches, and NaN does not equal NaN
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
