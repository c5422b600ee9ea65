"""The Triton kernels of latent attention: what their specifications' cases do not reach (those: tests/triton_on_cpu)."""

import copy
import math

import pytest
import torch

from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import configs
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from openmythos_kernels.verify.check import run
from openmythos_kernels.verify.specs import mla_attention as attention_spec
from tests.openmythos_kernels.ops import test_mla

CPU = torch.device("cpu")
BY_NAME = {d.name: d for d in attention_spec.SPECIFICATIONS}
ATTENTION, LATENT = BY_NAME["mla_attention"], BY_NAME["mla_attend_latent"]
INTERPRETER = pytest.mark.parametrize("triton_mode", ["interpreter"])
PTXSIM = pytest.mark.parametrize("triton_mode", ["ptxsim"])
BOTH = pytest.mark.parametrize("triton_mode", ["interpreter", "ptxsim"])


def inputs_of(d, sizes, dtype=torch.float32):
    return d.make(sizes, dtype, CPU, torch.Generator().manual_seed(0))


@INTERPRETER
def test_lse(triton_mode):
    """Is that of the scores, of base 2."""
    inputs = inputs_of(ATTENTION, ATTENTION.cases["rows of their own"])
    with backends.forcing("triton"):
        got = mla.attention(**inputs)[1]
    q = torch.cat((inputs["q_nope"], inputs["q_rope"]), -1)
    k = torch.cat((inputs["kv"][..., :16], inputs["k_rope"].unsqueeze(2).expand(-1, -1, 2, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, k) * 24**-0.5
    key = torch.arange(k.shape[1])
    sees = torch.minimum(inputs["start"][:, None] + torch.arange(q.shape[1]) + 1, inputs["key_lengths"][:, None])
    score = score.masked_fill((key >= sees[..., None])[:, None], float("-inf"))
    torch.testing.assert_close(got, score.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-5)


@BOTH
def test_layouts(triton_mode):
    """Views of wider tensors, as projections leave them, give the bits that dense tensors give."""
    dtype = torch.float32 if triton_mode == "interpreter" else torch.bfloat16
    inputs = inputs_of(ATTENTION, ATTENTION.cases["square"], dtype)
    q = torch.cat((inputs["q_nope"], inputs["q_rope"]), -1)
    k_rope = torch.cat((inputs["k_rope"], inputs["k_rope"]), -1)[..., : inputs["k_rope"].shape[-1]]
    capacity = torch.cat((inputs["kv"], torch.full_like(inputs["kv"], float("nan"))), 1)[:, : inputs["kv"].shape[1]]
    turned = inputs["q_rope"].transpose(1, 2).contiguous().transpose(1, 2)
    with backends.forcing("triton"):
        want = mla.attention(**inputs)
        got = mla.attention(q[..., :16], turned, capacity, k_rope, inputs["start"], inputs["key_lengths"])
    assert all(map(torch.equal, got, want))


@BOTH
def test_splits(triton_mode, monkeypatch):
    """However many splits, empty ones included, and in chunks of the latent as whole."""
    from openmythos_kernels.ops.mla.launch import latent as launch
    from openmythos_kernels.verify.check import wide

    inputs = inputs_of(LATENT, dict(rows=3, heads=9, latent=40, rope=8, capacity=150, held=[150, 0, 40]))
    want = LATENT.reference(**wide(inputs))["out"].float()
    for config in (configs.LatentConfig(16, 16, 64, 4, 1), configs.LatentConfig(8, 32, 16, 4, 1)):
        monkeypatch.setattr(configs, "latent", lambda *_, c=config: c)
        for n in (1, 2, 5, 7):
            monkeypatch.setattr(launch, "_splits", lambda *_, n=n: n)
            with backends.forcing("triton"):
                got = LATENT.fast(**LATENT.hostile(inputs))["out"]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@INTERPRETER
def test_addresses(triton_mode):
    """Rows of a cache, of kv and of q more than 2^31 elements apart. Memory that nobody touches costs nothing."""
    far = 2**31 + 4096

    def spread(x: torch.Tensor) -> torch.Tensor:
        width = x[0].numel()
        rows = -(-far // x.stride(1)) * x.stride(1)
        big = torch.empty(0, dtype=x.dtype).set_(torch.UntypedStorage((rows * (len(x) - 1) + width) * x.element_size()))
        return big.as_strided(x.shape, (rows, *x.stride()[1:])).copy_(x)

    latent = inputs_of(LATENT, dict(rows=2, heads=2, latent=16, rope=4, capacity=20, held=[20, 11]), torch.float16)
    attention = inputs_of(ATTENTION, dict(ATTENTION.cases["later chunk"], keys=20, start=15), torch.float16)
    with backends.forcing("triton"):
        for d, inputs, names in (
            (LATENT, latent, ("latent_cache", "rope_cache")),
            (ATTENTION, attention, ("kv", "q_nope")),
        ):
            want = d.fast(**inputs)["out"]
            inputs |= {name: spread(inputs[name]) for name in names}
            assert torch.equal(d.fast(**inputs)["out"], want)


@pytest.mark.parametrize(
    "triton_mode, dtype", [("interpreter", torch.float32), ("interpreter", torch.float16), ("ptxsim", torch.bfloat16)]
)
def test_decode(triton_mode, dtype):
    """The whole layer at one token, composed of matrix products and these kernels, against the reference module."""
    draws = []
    for lengths in ((1, 0), (31, 47)):
        module = test_mla.reference(test_mla.PLAIN, dtype, seed=3)
        x, freqs, mask = test_mla.token(module, lengths, seed=3)
        cache = test_mla.filled_cache(module, lengths, capacity=max(lengths) + 3)
        truth_cache, eager_cache = test_mla.widened(cache), test_mla.widened(cache)
        for entry in eager_cache.values():
            entry.tensors = {name: t.to(dtype) for name, t in entry.tensors.items()}
        positional, named = test_mla.named_args(module, cache, x, freqs)
        with torch.no_grad():
            with backends.forcing("triton"):
                fast = mla.decode(*positional, **named)
            eager = module(x, freqs, mask, eager_cache).squeeze(1)
            truth = copy.deepcopy(module).double()(x.double(), freqs, mask, truth_cache).squeeze(1)
        draws.append([{"y": y} for y in (fast, eager, truth)])
    assert_within_budget(*(pooled(draw) for draw in zip(*draws)))


@INTERPRETER
def test_bytes_read(triton_mode, monkeypatch):
    """16 heads (mythos_1b's) read a row's cache once: all loads together at most 1.1 times its bytes."""
    from benchmarks.suites import traffic
    from openmythos_kernels.ops.mla.launch import latent as launch

    monkeypatch.setattr(launch, "_splits", lambda *_: 2)
    assert 1.0 <= traffic.cache_read(rows=1) <= 1.1


@PTXSIM
def test_variants(triton_mode, monkeypatch):
    """The number of compiled kernels does not grow with token counts, capacities or batch sizes."""
    from openmythos_kernels.ops.mla.kernels.attention import attention_kernel
    from openmythos_kernels.ops.mla.kernels.attention_backward import attention_dkv_kernel, attention_dq_kernel
    from openmythos_kernels.ops.mla.kernels.latent import attend_latent_kernel
    from openmythos_kernels.ops.mla.launch import latent as launch

    kernels = attention_kernel, attention_dq_kernel, attention_dkv_kernel, attend_latent_kernel
    counts = set()
    monkeypatch.setattr(launch, "_splits", lambda *_: 1)
    with backends.forcing("triton"):
        for B, T, S in ((1, 1, 1), (2, 3, 5), (1, 16, 16), (3, 17, 32), (1, 2, 48)):
            inputs = inputs_of(ATTENTION, dict(ATTENTION.cases["square"], rows=B, tokens=T, keys=S), torch.float16)
            run(ATTENTION.fast, inputs, ATTENTION.differentiable, {"out": torch.ones(B, T, 2, 16)})
            # rows of 16 channels: every stride is a multiple of 16, as in every published variant
            LATENT.fast(
                **inputs_of(LATENT, dict(rows=B, heads=2, latent=16, rope=16, capacity=S, held=S), torch.float16)
            )
            counts.add(tuple(sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels))
    assert len(counts) == 1, counts
