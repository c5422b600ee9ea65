"""Checks of the Triton kernels of latent attention, run in a process of their own.

    python -m tests.openmythos_kernels.ops.mla_triton_checks MODE CHECK

MODE is "interpreter" (with TRITON_INTERPRET=1) or "ptxsim" (what Triton generates for sm_80, executed on the CPU; it
must be importable). A failed check raises.
"""

from __future__ import annotations

import contextlib
import math
import sys

import torch

from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import configs, describe_attention
from openmythos_kernels.ops.mla.launch import latent as latent_launch
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.budget import assert_within_budget
from tests.openmythos_kernels.ops import test_mla

CPU = torch.device("cpu")
BY_NAME = {d.name: d for d in describe_attention.DESCRIPTIONS}
MODES = {
    "interpreter": (torch.float32, torch.float16),
    "ptxsim": (torch.bfloat16, torch.float16, torch.float32),
}


def run(call, inputs, wanted, grads):
    """Outputs and gradients by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    outputs = call(**{**inputs, **leaves})
    found = {k: v.detach() for k, v in outputs.items()}
    if wanted:
        given = [g.to(o.dtype) for g, o in zip(grads, outputs.values())]
        needed = [(o, g) for o, g in zip(outputs.values(), given) if o.requires_grad]
        results, above = zip(*needed)
        back = torch.autograd.grad(results, list(leaves.values()), above, allow_unused=True)
        found |= {f"d{name}": g for name, g in zip(leaves, back)}
    return found


def wide(inputs):
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() and k != "freqs" else v
        for k, v in inputs.items()
    }


def budget(name: str, dtypes) -> None:
    """Outputs and gradients within the error budget, run twice with the same bits, whatever lies behind row ends."""
    d = BY_NAME[name]
    for dtype in dtypes:
        for case, sizes in d.cases.items():
            draw = torch.Generator().manual_seed(1)
            inputs = d.make(sizes, dtype, CPU, draw)
            shapes = [o.shape for o in d.reference(**inputs).values()]
            grads = [torch.randn(s, generator=draw).to(dtype) for s in shapes]
            eager = run(d.reference, inputs, d.differentiable, grads)
            truth = run(d.reference, wide(inputs), d.differentiable, grads)
            with backends.forcing("triton"):
                hostile = (d.hostile or dict)(inputs)
                fast = run(d.fast, hostile, d.differentiable, grads)
                again = run(d.fast, hostile, d.differentiable, grads)
            try:
                assert_within_budget(fast, eager, truth)
            except AssertionError as error:
                raise AssertionError(f"{name}, {case}, {dtype}: {error}") from None
            for key, value in fast.items():
                assert value is None or torch.equal(value, again[key]), f"{name}, {case}, {dtype}: {key} differs between runs"
            print(name, case, dtype, flush=True)


def lse(dtypes) -> None:
    """The lse is that of the scores."""
    d = BY_NAME["mla_attention"]
    inputs = d.make(d.cases["rows of their own"], torch.float32, CPU, torch.Generator().manual_seed(0))
    with backends.forcing("triton"):
        got = mla.attention(**inputs)[1]
    q = torch.cat((inputs["q_nope"], inputs["q_rope"]), -1)
    k = torch.cat((inputs["kv"][..., :16], inputs["k_rope"].unsqueeze(2).expand(-1, -1, 2, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, k) * 24**-0.5
    key = torch.arange(k.shape[1])
    sees = torch.minimum(inputs["start"][:, None] + torch.arange(q.shape[1]) + 1, inputs["key_lengths"][:, None])
    score = score.masked_fill((key >= sees[..., None])[:, None], float("-inf"))
    torch.testing.assert_close(got, score.logsumexp(-1) / math.log(2), rtol=1e-5, atol=1e-5)


def layouts(dtypes) -> None:
    """Views of wider tensors, as projections leave them, give the bits that dense tensors give."""
    d = BY_NAME["mla_attention"]
    inputs = d.make(d.cases["square"], dtypes[0], CPU, torch.Generator().manual_seed(0))
    q = torch.cat((inputs["q_nope"], inputs["q_rope"]), -1)
    k_rope = torch.cat((inputs["k_rope"], inputs["k_rope"]), -1)[..., : inputs["k_rope"].shape[-1]]
    capacity = torch.cat((inputs["kv"], torch.full_like(inputs["kv"], float("nan"))), 1)[:, : inputs["kv"].shape[1]]
    turned = inputs["q_rope"].transpose(1, 2).contiguous().transpose(1, 2)
    with backends.forcing("triton"):
        want = mla.attention(**inputs)
        got = mla.attention(q[..., :16], turned, capacity, k_rope, inputs["start"], inputs["key_lengths"])
    assert all(map(torch.equal, got, want))


def groups(dtypes) -> None:
    """The shared key's gradient is the same sum, within rounding, however the heads are divided over programs."""
    from openmythos_kernels.ops.mla.launch import attention as launch

    d = BY_NAME["mla_attention"]
    inputs = d.make(dict(d.cases["square"], heads=3), torch.float32, CPU, torch.Generator().manual_seed(0))
    grad = torch.randn(2, 37, 3, 16)
    found = []
    for heads in (1, 2, 3):
        launch._heads_per_program = lambda *_, n=heads: n
        with backends.forcing("triton"):
            found.append(run(d.fast, inputs, ("k_rope",), [grad])["dk_rope"])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def splits(dtypes) -> None:
    """However many splits, empty ones included, and in chunks of the latent as whole."""
    d = BY_NAME["mla_attend_latent"]
    sizes = dict(rows=3, heads=9, latent=40, rope=8, capacity=150, held=[150, 0, 40])
    inputs = d.make(sizes, torch.float32, CPU, torch.Generator().manual_seed(0))
    want = d.reference(**wide(inputs))["out"].float()
    for config in (configs.LatentConfig(16, 16, 64, 4, 1), configs.LatentConfig(8, 32, 16, 4, 1)):
        configs.latent = lambda *_, c=config: c
        for n in (1, 2, 5, 7):
            latent_launch._splits = lambda *_, n=n: n
            with backends.forcing("triton"):
                got = d.fast(**d.hostile(inputs))["out"]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def addresses(dtypes) -> None:
    """Rows of a cache, of kv and of q more than 2^31 elements apart. Memory that nobody touches costs nothing."""
    far = 2**31 + 4096
    draw = torch.Generator().manual_seed(0)

    def spread(x: torch.Tensor) -> torch.Tensor:
        width = x[0].numel()
        rows = -(-far // x.stride(1)) * x.stride(1)
        big = torch.empty(rows * (len(x) - 1) + width, dtype=x.dtype)
        out = big.as_strided(x.shape, (rows, *x.stride()[1:]))
        return out.copy_(x)

    d = BY_NAME["mla_attend_latent"]
    inputs = d.make(dict(rows=2, heads=2, latent=16, rope=4, capacity=20, held=[20, 11]), torch.float16, CPU, draw)
    d2 = BY_NAME["mla_attention"]
    inputs2 = d2.make(dict(d2.cases["later chunk"], keys=20, start=15), torch.float16, CPU, draw)
    with backends.forcing("triton"):
        want, want2 = d.fast(**inputs)["out"], d2.fast(**inputs2)["out"]
        for name in ("latent_cache", "rope_cache"):
            inputs[name] = spread(inputs[name])
        assert torch.equal(d.fast(**inputs)["out"], want)
        for name in ("kv", "q_nope"):
            inputs2[name] = spread(inputs2[name])
        assert torch.equal(d2.fast(**inputs2)["out"], want2)


def decode(dtypes) -> None:
    """The whole layer at one token, composed of matrix products and these kernels, against the reference module."""
    for dtype in dtypes:
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
                truth = test_mla.copy.deepcopy(module).double()(x.double(), freqs, mask, truth_cache).squeeze(1)
            draws.append([{"y": y} for y in (fast, eager, truth)])
        assert_within_budget(*(test_mla.pooled(draw) for draw in zip(*draws)))


def bytes_read(dtypes) -> None:
    """16 heads (mythos_1b's) read a row's cache once: all loads together at most 1.1 times its bytes."""
    from triton.runtime import interpreter

    read = [0]
    builder = type(interpreter.interpreter_builder)
    original = builder.create_masked_load

    def counted(self, ptrs, mask, other, *rest):
        read[0] += int(mask.data.astype(bool).sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return original(self, ptrs, mask, other, *rest)

    builder.create_masked_load = counted
    d = BY_NAME["mla_attend_latent"]
    inputs = d.make(dict(rows=1, heads=16, latent=256, rope=32, capacity=4096, held=4000), torch.float16, CPU,
                    torch.Generator().manual_seed(0))  # fmt: skip
    latent_launch._splits = lambda *_: 2
    with backends.forcing("triton"):
        mla.attend_latent(**inputs)
    ratio = read[0] / (4000 * (256 + 32) * 2)
    assert 1.0 <= ratio <= 1.1, ratio


def variants(dtypes) -> None:
    """The number of compiled kernels does not grow with token counts, capacities or batch sizes."""
    from openmythos_kernels.ops.mla.kernels.attention import attention_kernel
    from openmythos_kernels.ops.mla.kernels.attention_backward import attention_dkv_kernel, attention_dq_kernel
    from openmythos_kernels.ops.mla.kernels.latent import attend_latent_kernel

    d, d2 = BY_NAME["mla_attention"], BY_NAME["mla_attend_latent"]
    kernels = attention_kernel, attention_dq_kernel, attention_dkv_kernel, attend_latent_kernel
    counts = set()
    latent_launch._splits = lambda *_: 1
    with backends.forcing("triton"):
        for B, T, S in ((1, 1, 1), (2, 3, 5), (1, 16, 16), (3, 17, 32), (1, 2, 48)):
            inputs = d.make(dict(d.cases["square"], rows=B, tokens=T, keys=S), torch.float16, CPU, torch.Generator())
            run(d.fast, inputs, d.differentiable, [torch.ones(B, T, 2, 16)])
            # rows of 16 channels: every stride is a multiple of 16, as in every published variant
            sizes = dict(rows=B, heads=2, latent=16, rope=16, capacity=S, held=S)
            d2.fast(**d2.make(sizes, torch.float16, CPU, torch.Generator()))
            counts.add(tuple(sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels))
    assert len(counts) == 1, counts


if __name__ == "__main__":
    mode, check, *rest = sys.argv[1:]
    if mode == "ptxsim":
        import tritonsim

        context = tritonsim.on_cpu()
    else:
        context = contextlib.nullcontext()
    with context:
        if check == "budget":
            budget(rest[0], MODES[mode])
        else:
            globals()[check](MODES[mode])
