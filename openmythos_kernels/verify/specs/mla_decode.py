"""The specification of a whole layer's decode step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from openmythos.layers import apply_rope
from openmythos.variants import VARIANTS
from openmythos_kernels.ops import mla
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer
from openmythos_kernels.verify.specs.mla_attention import angles, reference_attention, reference_norm_rope, row_lengths


def _make(sizes: Sizes, dtype, device, generator) -> Inputs:
    """Weights of more than unit gain, so that softmax is far from uniform."""
    B, D, C, H = sizes["rows"], sizes["dim"], sizes["capacity"], sizes["heads"]
    r, q_rank, nope, rope, v = (sizes[name] for name in ("latent", "q_rank", "nope", "rope", "v"))
    draw = drawer(dtype, device, generator)

    def matrix(rows: int, cols: int):
        return draw(rows, cols, scale=1.5 * cols**-0.5)

    return dict(
        x=draw(B, D),
        freqs=angles(B, 1, rope, device).squeeze(1),
        latent_cache=draw(B, C, r),
        rope_cache=draw(B, C, rope),
        lengths=row_lengths(sizes["held"], B, device).clamp(max=C - 1),
        q_down=matrix(q_rank, D),
        q_norm=draw(q_rank),
        q_up_nope=matrix(H * nope, q_rank),
        q_up_rope=matrix(H * rope, q_rank),
        kv_down=matrix(r + rope, D),
        kv_norm=draw(r),
        kv_up=matrix(H * (nope + v), r),
        wo=matrix(D, H * v),
        n_heads=H,
        nope=nope,
        rope=rope,
        v=v,
        eps=1e-6,
    )


def _outputs(y, latent_cache, rope_cache, lengths) -> Outputs:
    """The result, and the token that each row has appended."""
    at = torch.arange(len(lengths), device=lengths.device), lengths
    return {"y": y, "latent": latent_cache[at], "k_rope": rope_cache[at]}


def _fast(latent_cache, rope_cache, lengths, **inputs) -> Outputs:
    dense = torch.contiguous_format  # a cache is written in place, and so must be dense
    latent_cache, rope_cache = latent_cache.clone(memory_format=dense), rope_cache.clone(memory_format=dense)
    y = mla.decode(latent_cache=latent_cache, rope_cache=rope_cache, lengths=lengths, **inputs)
    return _outputs(y, latent_cache, rope_cache, lengths)


def _reference(
    x,
    freqs,
    latent_cache,
    rope_cache,
    lengths,
    q_down,
    q_norm,
    q_up_nope,
    q_up_rope,
    kv_down,
    kv_norm,
    kv_up,
    wo,
    n_heads,
    nope,
    rope,
    v,
    eps,
) -> Outputs:
    """`openmythos.MLAttention`'s forward with keys and values expanded per head."""
    freqs, x = freqs.unsqueeze(1), x.unsqueeze(1)
    c_q = reference_norm_rope(F.linear(x, q_down), freqs, q_norm, eps)["normed"]
    q_nope = F.linear(c_q, q_up_nope).unflatten(-1, (n_heads, nope))
    q_rope = apply_rope(F.linear(c_q, q_up_rope).unflatten(-1, (n_heads, rope)), torch.view_as_complex(freqs))
    new = reference_norm_rope(F.linear(x, kv_down), freqs, kv_norm, eps)
    caches = latent_cache.clone(), rope_cache.clone()
    at = torch.arange(len(lengths), device=lengths.device), lengths
    for cache, tokens in zip(caches, new.values()):
        cache[at] = tokens.squeeze(1)
    kv = F.linear(caches[0], kv_up).unflatten(-1, (n_heads, nope + v))
    out = reference_attention(q_nope, q_rope, kv, caches[1], lengths, lengths + 1)["out"]
    return _outputs(F.linear(out.flatten(2), wo).squeeze(1), *caches, lengths)


def _hostile(inputs: Inputs) -> Inputs:
    """NaN in every place of the caches that no row holds."""
    fresh = {name: torch.full_like(inputs[name], float("nan")) for name in ("latent_cache", "rope_cache")}
    for name, cache in fresh.items():
        for b, n in enumerate(inputs["lengths"].tolist()):
            cache[b, :n] = inputs[name][b, :n]
    return {**inputs, **fresh}


def _shape(*sizes) -> dict:
    names = ("rows", "dim", "heads", "latent", "q_rank", "nope", "rope", "v", "capacity", "held")
    return dict(zip(names, sizes, strict=True))


def _published(cfg, cached: int) -> dict:
    return _shape(
        1,
        cfg.dim,
        cfg.n_heads,
        cfg.kv_lora_rank,
        cfg.q_lora_rank,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
        cached + 1,
        cached,
    )


SPECIFICATIONS = [
    Specification(
        name="mla_decode",
        backends=("cpu", "triton"),
        make=_make,
        fast=_fast,
        reference=_reference,
        differentiable=(),
        cases={
            # Tiles of 16 keys, tasks of 128: below, at and above.
            "rows of their own": _shape(3, 48, 8, 32, 24, 16, 8, 16, 20, [14, 15, 16]),
            "an empty cache": _shape(2, 40, 1, 24, 8, 4, 2, 8, 3, [0, 2]),
            "odd": _shape(2, 33, 3, 21, 11, 5, 6, 7, 50, [31, 47]),
            "two vectors of heads": _shape(2, 24, 17, 40, 9, 3, 2, 5, 130, [126, 128]),
            "five heads, width one": _shape(2, 16, 5, 1, 1, 1, 2, 1, 8, [6, 7]),
            "long": _shape(3, 32, 4, 24, 16, 8, 4, 8, 301, [0, 300, 129]),
            "full": _shape(1, 32, 2, 16, 16, 8, 4, 8, 33, 32),
        },
        ranges=dict(
            rows=(1, 3),
            dim=(1, 70),
            heads=(1, 9),
            latent=(1, 70),
            q_rank=(1, 40),
            nope=(1, 20),
            v=(1, 20),
            capacity=(20, 150),
        ),
        shipped={name: _published(cfg(), 4096) for name, cfg in VARIANTS.items()},
        matrix=True,
        hostile=_hostile,
    )
]
