"""Specifications of per-head attention in both forms, attention over latents, the cache append, norm_rope and the
projections."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from openmythos.attention import attend
from openmythos.variants import VARIANTS
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer


def row_lengths(values, rows: int, device) -> Tensor:
    values = values if isinstance(values, (list, tuple)) else [values] * rows
    return torch.tensor([values[b % len(values)] for b in range(rows)], dtype=torch.int64, device=device)


def angles(rows: int, tokens: int, rope: int, device) -> Tensor:
    at = torch.arange(rows * tokens, device=device, dtype=torch.float32).reshape(rows, tokens, 1)
    angle = at * torch.arange(1, rope // 2 + 1, device=device) * 0.37
    return torch.stack((angle.cos(), angle.sin()), -1)


# ---- per-head attention ----


def _make_attention(sizes: Sizes, dtype, device, generator) -> Inputs:
    B, T, S, H = sizes["rows"], sizes["tokens"], sizes["keys"], sizes["heads"]
    nope, rope, v = sizes["nope"], sizes["rope"], sizes["v"]
    draw = drawer(dtype, device, generator)
    return dict(
        q_nope=draw(B, T, H, nope),
        q_rope=draw(B, T, H, rope),
        kv=draw(B, S, H, nope + v),
        k_rope=draw(B, S, rope),
        start=row_lengths(sizes["start"], B, device),
        key_lengths=row_lengths(sizes.get("held", S), B, device).clamp(max=S),
    )


def _fast_attention(**inputs) -> Outputs:
    return {"out": mla.attention(**inputs)[0]}


def reference_attention(q_nope, q_rope, kv, k_rope, start, key_lengths) -> Outputs:
    return {"out": formula.attention_output(q_nope, q_rope, kv, k_rope, start, key_lengths)}


def _hostile_attention(inputs: Inputs) -> Inputs:
    """NaN in the keys past each row's end."""
    kv, k_rope = inputs["kv"].clone(), inputs["k_rope"].clone()
    for b, n in enumerate(inputs["key_lengths"].tolist()):
        kv[b, n:] = k_rope[b, n:] = float("nan")
    return {**inputs, "kv": kv, "k_rope": k_rope}


def _heads(cfg) -> dict:
    return dict(heads=cfg.n_heads, nope=cfg.qk_nope_head_dim, rope=cfg.qk_rope_head_dim, v=cfg.v_head_dim)


_SMALL = dict(rows=2, heads=2, nope=16, rope=8, v=16)
_ATTENTION = Specification(
    name="mla_attention",
    backends=("triton", "cpu"),
    make=_make_attention,
    fast=_fast_attention,
    reference=reference_attention,
    differentiable=("q_nope", "q_rope", "kv", "k_rope"),
    cases={
        "square": dict(_SMALL, tokens=37, keys=37, start=0),
        "later chunk": dict(_SMALL, tokens=5, keys=70, start=65),
        "odd heads": dict(rows=1, heads=3, nope=5, rope=6, v=7, tokens=35, keys=35, start=0),
        "rows of their own": dict(_SMALL, tokens=6, keys=40, start=[30, 2], held=[36, 8]),
        "queries behind the last key": dict(_SMALL, tokens=6, keys=40, start=[30, 34], held=[20, 40]),
        "queries that see nothing": dict(_SMALL, tokens=33, keys=33, start=[-3, 0], held=[33, 0]),
        "one query": dict(_SMALL, tokens=1, keys=33, start=32),
        "no queries": dict(_SMALL, tokens=0, keys=3, start=0),
        "no keys": dict(_SMALL, tokens=3, keys=0, start=0),
        "wide heads": dict(rows=1, heads=2, nope=96, rope=32, v=96, tokens=18, keys=18, start=0),
    },
    ranges=dict(rows=(1, 3), heads=(1, 4), nope=(1, 40), v=(1, 40), tokens=(1, 70), keys=(1, 70)),
    shipped={name: dict(_heads(cfg()), rows=1, tokens=4096, keys=4096, start=0) for name, cfg in VARIANTS.items()},
    matrix=True,
    hostile=_hostile_attention,
)


# ---- per-head attention of packed rows ----


def _counts(sizes: Sizes) -> list[int]:
    """Rows of each sequence. A number instead of a list scatters them between none and all."""
    given, S = sizes["counts"], sizes["keys"]
    if isinstance(given, int):
        return [given * (2 * b + 1) % (S + 1) for b in range(sizes["rows"])]
    return [given[b % len(given)] for b in range(sizes["rows"])]


def _make_attention_rows(sizes: Sizes, dtype, device, generator) -> Inputs:
    B, S, H, counts = sizes["rows"], sizes["keys"], sizes["heads"], _counts(sizes)
    nope, rope, v, N = sizes["nope"], sizes["rope"], sizes["v"], sum(counts)
    draw = drawer(dtype, device, generator)
    position = torch.empty(N, dtype=torch.int64, device=device)
    if generator is not None:
        places = [torch.randperm(S, generator=generator, device=device)[:n].sort().values for n in counts]
        position = torch.cat([position[:0], *places])
    return dict(
        q_nope=draw(N, H, nope),
        q_rope=draw(N, H, rope),
        kv=draw(B, S, H, nope + v),
        k_rope=draw(B, S, rope),
        position=position,
        offset=torch.tensor([0, *counts], device=device).cumsum(0),
    )


def _fast_attention_rows(**inputs) -> Outputs:
    return {"out": mla.attention_rows(**inputs)[0]}


def reference_attention_rows(q_nope, q_rope, kv, k_rope, position, offset) -> Outputs:
    return {"out": formula.attention_rows_output(q_nope, q_rope, kv, k_rope, position, offset)}


def _hostile_attention_rows(inputs: Inputs) -> Inputs:
    """NaN in the keys behind each sequence's last row."""
    kv, k_rope = inputs["kv"].clone(), inputs["k_rope"].clone()
    for b, (first, end) in enumerate(pairwise(inputs["offset"].tolist())):
        held = int(inputs["position"][end - 1]) + 1 if first < end else 0
        kv[b, held:] = k_rope[b, held:] = float("nan")
    return {**inputs, "kv": kv, "k_rope": k_rope}


_ATTENTION_ROWS = Specification(
    name="mla_attention_rows",
    backends=("triton", "cpu"),
    make=_make_attention_rows,
    fast=_fast_attention_rows,
    reference=reference_attention_rows,
    differentiable=("q_nope", "q_rope", "kv", "k_rope"),
    cases={
        "some rows": dict(_SMALL, rows=3, keys=70, counts=[20, 3, 37]),
        "all rows": dict(_SMALL, keys=37, counts=[37]),
        "one row each": dict(_SMALL, rows=3, keys=33, counts=[1]),
        "sequences without rows": dict(_SMALL, rows=4, keys=20, counts=[0, 7, 0]),
        "far apart": dict(_SMALL, keys=150, counts=[9, 70]),
        "odd heads": dict(rows=2, heads=3, nope=5, rope=6, v=7, keys=35, counts=[11, 35]),
        "no rows": dict(_SMALL, keys=3, counts=[0]),
        "no sequences": dict(_SMALL, rows=0, keys=3, counts=[0]),
        "wide heads": dict(rows=1, heads=2, nope=96, rope=32, v=96, keys=18, counts=[12]),
    },
    ranges=dict(rows=(1, 4), heads=(1, 4), nope=(1, 40), v=(1, 40), keys=(1, 70), counts=(0, 100)),
    shipped={name: dict(_heads(cfg()), rows=1, keys=4096, counts=[2048]) for name, cfg in VARIANTS.items()},
    matrix=True,
    hostile=_hostile_attention_rows,
)


# ---- attention over latents ----


def _make_latent(sizes: Sizes, dtype, device, generator) -> Inputs:
    B, H, r, rope, C = sizes["rows"], sizes["heads"], sizes["latent"], sizes["rope"], sizes["capacity"]
    draw = drawer(dtype, device, generator)
    page = sizes.get("page", 0)
    lengths = row_lengths(sizes["held"], B, device).clamp(max=C)
    table, shape = None, (B, C)
    if page:
        pages = -(-C // page)
        shape = (B * pages, page)
        table = torch.arange(B * pages, device=device, dtype=torch.int32).flip(0).reshape(B, pages)
    return dict(
        q_latent=draw(B, H, r),
        q_rope=draw(B, H, rope),
        latent_cache=draw(*shape, r),
        rope_cache=draw(*shape, rope),
        lengths=lengths,
        table=table,
        scale=(sizes.get("nope", r) + rope) ** -0.5,
    )


def reference_latent(q_latent, q_rope, latent_cache, rope_cache, lengths, table, scale) -> Outputs:
    """Row by row, by `openmythos.attention.attend` with one head of keys for all queries."""
    rows = []
    for b, n in enumerate(lengths.tolist()):
        latent, rope = (_held(cache, b, n, table) for cache in (latent_cache, rope_cache))
        q, k = torch.cat((q_latent[b], q_rope[b]), -1), torch.cat((latent, rope), -1)
        q = q * (scale * q.shape[-1] ** 0.5)  # `attend` scales by the width of its queries
        H = len(q)
        out = attend(
            q[None, None],
            k[None, :, None].expand(-1, -1, H, -1),
            latent[None, :, None].expand(-1, -1, H, -1),
            None,
            lambda w: w,
        )
        rows.append(out.view(q_latent.shape[1:]) if n else torch.zeros_like(q_latent[b]))
    return {"out": torch.stack(rows) if rows else torch.empty_like(q_latent)}


def _held(cache: Tensor, b: int, n: int, table) -> Tensor:
    if table is None:
        return cache[b, :n]
    key = torch.arange(n, device=cache.device)
    return cache[table[b, key // cache.shape[1]].long(), key % cache.shape[1]]


def _hostile_latent(inputs: Inputs) -> Inputs:
    """NaN in every place of the caches that no row holds, and wild pages after each row's last one."""
    table, caches = inputs["table"], [inputs[name] for name in ("latent_cache", "rope_cache")]
    fresh = [torch.full_like(cache, float("nan")) for cache in caches]
    table = None if table is None else table.clone()
    for b, n in enumerate(inputs["lengths"].tolist()):
        for new, cache in zip(fresh, caches):
            if table is None:
                new[b, :n] = cache[b, :n]
            else:
                key = torch.arange(n, device=cache.device)
                at = table[b, key // cache.shape[1]].long(), key % cache.shape[1]
                new[at] = cache[at]
        if table is not None:
            table[b, -(-n // caches[0].shape[1]) :] = 2**30
    return {**inputs, "latent_cache": fresh[0], "rope_cache": fresh[1], "table": table}


_LATENT_SMALL = dict(rows=2, heads=4, latent=24, rope=6, capacity=70)
_LATENT = Specification(
    name="mla_attend_latent",
    backends=("triton",),
    make=_make_latent,
    fast=lambda **inputs: {"out": mla.attend_latent(**inputs)},
    reference=reference_latent,
    differentiable=(),
    cases={
        "rows of their own": dict(_LATENT_SMALL, held=[70, 3]),
        "an empty row": dict(_LATENT_SMALL, held=[0, 33]),
        "splits": dict(rows=1, heads=20, latent=32, rope=16, capacity=600, held=590),
        "pages": dict(_LATENT_SMALL, page=16, held=[70, 17]),
        "pages larger than tiles": dict(_LATENT_SMALL, page=64, held=[70, 65]),
        "a row index": dict(_LATENT_SMALL, page=1, held=[40, 16]),
        "no rows": dict(_LATENT_SMALL, rows=0, held=0),
    },
    ranges=dict(rows=(1, 3), heads=(1, 20), latent=(1, 70), capacity=(1, 150)),
    shipped={
        name: dict(_heads(cfg()), latent=cfg().kv_lora_rank, rows=1, capacity=4096, held=4096)
        for name, cfg in VARIANTS.items()
    },
    matrix=True,
    hostile=_hostile_latent,
)


# ---- norm and rotation ----


def _make_norm_rope(sizes: Sizes, dtype, device, generator) -> Inputs:
    B, T, r, heads, rope = sizes["rows"], sizes["tokens"], sizes["latent"], sizes["heads"], sizes["rope"]
    draw = drawer(dtype, device, generator)
    weight = draw(r).float() if sizes.get("masters") else draw(r)  # float32 weights, as under autocast
    return dict(x=draw(B, T, r + heads * rope), freqs=angles(B, T, rope, device), weight=weight, eps=1e-6)


def reference_norm_rope(x, freqs, weight, eps) -> Outputs:
    return dict(zip(("normed", "rotated"), formula.norm_rope(x, freqs, weight, eps)))


_NORM_ROPE = Specification(
    name="mla_norm_rope",
    backends=("cpu", "triton"),
    make=_make_norm_rope,
    fast=lambda **inputs: dict(zip(("normed", "rotated"), mla.norm_rope(**inputs))),
    reference=reference_norm_rope,
    differentiable=("x", "weight"),
    cases={
        "latent and key": dict(rows=2, tokens=5, latent=24, heads=1, rope=6),
        "float32 weight": dict(rows=2, tokens=5, latent=24, heads=1, rope=6, masters=True),
        "norm alone": dict(rows=2, tokens=3, latent=21, heads=0, rope=4),
        "rotation alone": dict(rows=1, tokens=7, latent=0, heads=3, rope=8),
        "no tokens": dict(rows=2, tokens=0, latent=8, heads=1, rope=4),
    },
    ranges=dict(rows=(1, 3), tokens=(1, 20), latent=(1, 70), heads=(1, 4)),
    shipped={
        name: dict(rows=1, tokens=4096, latent=cfg().kv_lora_rank, heads=1, rope=cfg().qk_rope_head_dim)
        for name, cfg in VARIANTS.items()
    },
)


# ---- projections ----


def _make_linear(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    return dict(x=draw(sizes["tokens"], sizes["ins"]), weight=draw(sizes["outs"], sizes["ins"]))


_LINEAR = Specification(
    name="mla_linear",
    backends=("cpu",),
    make=_make_linear,
    fast=lambda x, weight: {"y": mla.linear(x, weight)},
    reference=lambda x, weight: {"y": formula.projection(x, weight)},
    differentiable=("x", "weight"),
    cases={
        "plain": dict(tokens=9, ins=24, outs=40),
        "primes": dict(tokens=13, ins=37, outs=11),
        "by oneDNN": dict(tokens=260, ins=130, outs=150),
        "one token": dict(tokens=1, ins=64, outs=32),
        "no token": dict(tokens=0, ins=8, outs=4),
    },
    ranges=dict(tokens=(0, 60), ins=(1, 100), outs=(1, 100)),
)


# ---- append ----


def _make_append(sizes: Sizes, dtype, device, generator) -> Inputs:
    B, T, r, rope, C = sizes["rows"], sizes["tokens"], sizes["latent"], sizes["rope"], sizes["capacity"]
    draw = drawer(dtype, device, generator)
    latent = _make_latent({**sizes, "heads": 1}, dtype, device, generator)
    return dict(
        kv=draw(B, T, r + rope),
        freqs=angles(B, T, rope, device),
        norm=draw(r),
        latent_cache=latent["latent_cache"],
        rope_cache=latent["rope_cache"],
        lengths=latent["lengths"].clamp(max=C - T),
        table=latent["table"],
        eps=1e-6,
    )


def _fast_append(latent_cache, rope_cache, **inputs) -> Outputs:
    latent_cache, rope_cache = latent_cache.clone(), rope_cache.clone()
    mla.append(latent_cache=latent_cache, rope_cache=rope_cache, **inputs)
    return {"latent_cache": latent_cache, "rope_cache": rope_cache}


def reference_append(kv, freqs, norm, latent_cache, rope_cache, lengths, table, eps) -> Outputs:
    """By `openmythos.layers`, then written token by token."""
    caches = latent_cache.clone(), rope_cache.clone()
    new = reference_norm_rope(kv, freqs, norm, eps).values()
    page = latent_cache.shape[1]
    for cache, tokens in zip(caches, new):
        for b, n in enumerate(lengths.tolist()):
            for t in range(kv.shape[1]):
                row, place = (b, n + t) if table is None else (int(table[b, (n + t) // page]), (n + t) % page)
                cache[row, place] = tokens[b, t]
    return dict(zip(("latent_cache", "rope_cache"), caches))


_APPEND = Specification(
    name="mla_append",
    backends=("triton",),
    make=_make_append,
    fast=_fast_append,
    reference=reference_append,
    differentiable=(),
    cases={
        "one token": dict(rows=2, tokens=1, latent=24, rope=6, capacity=20, held=[19, 0]),
        "a chunk over pages": dict(rows=2, tokens=9, latent=16, rope=4, capacity=32, held=[13, 3], page=8),
        "a row index": dict(rows=1, tokens=3, latent=16, rope=4, capacity=8, held=2, page=1),
    },
    ranges=dict(rows=(1, 3), latent=(1, 70), tokens=(1, 8)),
)

SPECIFICATIONS = [_ATTENTION, _ATTENTION_ROWS, _LATENT, _NORM_ROPE, _LINEAR, _APPEND]
