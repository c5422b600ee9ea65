"""Decoding with a cache of latents: `mla_append` writes to it, `mla_attend_latent` attends to it without expanding it.

The up-projection of keys is absorbed into the query and that of values into the output (DeepSeek-V2, arXiv 2405.04434,
section 2.1.2). All heads then share one key per token, [normed latent | rotary key], whose latent part is also the
value: a latent is read once and serves as both.

The cache is dense, (B, capacity, width), or in pages (P, page, width) that a table (B, pages) int32 assigns to rows:
token j of row b is at [table[b, j // page], j % page]. With pages of one token the table is an index of cache rows, so
that the latents of a row can be ragged over loops. Table entries and cache rows past a row's length are never used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos import debug
from openmythos_kernels.ops.dtypes import KERNEL_FLOATS
from openmythos_kernels.ops.op import Op


def attend_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Mean latent per head, weighted by the softmax over j < lengths[b] of (q_latent . latent[j] + q_rope . k_rope[j])
    * scale.

    Inference only: it has no gradient. Sums are float32.

    Args:
        q_latent: (B, H, r), one of KERNEL_FLOATS: the queries in the latent space. q_rope: (B, H, rope), rotated.
        latent_cache: (B, C, r), or (P, page, r) with a table. rope_cache: the same with rope. Each row (page)
            is densely packed; there may be gaps between rows.
        lengths: (B,) int64, the keys that each row sees, at most what the cache has room for (more are taken for that);
            a row without keys gives zeros.
        table: (B, n) int32, the pages of each row.
        scale: (nope + rope)^-0.5.

    Returns:
        (B, H, r), q_latent's dtype.

    Raises:
        ValueError: an argument's shape, dtype, strides or device is not as above; under the debug switch, a length or
            a table's entry is not.
    """
    if q_latent.dim() != 3 or q_latent.dtype not in KERNEL_FLOATS:
        raise ValueError(
            f"q_latent: got {q_latent.dtype} {tuple(q_latent.shape)}, must be (B, H, r) in one of {KERNEL_FLOATS}"
        )
    B, H, r = q_latent.shape
    rope = q_rope.shape[-1]
    _expect("q_rope", q_rope, q_latent.dtype, (B, H, rope), q_latent)
    _check_cache(q_latent, latent_cache, rope_cache, lengths, table, B, r, rope)
    _check_values(latent_cache, lengths, table, 0)
    return mla_attend_latent(
        q_latent.contiguous(),
        q_rope.contiguous(),
        latent_cache,
        rope_cache,
        lengths.contiguous(),
        None if table is None else table.contiguous(),
        scale,
    )


def append(
    kv: Tensor,
    freqs: Tensor,
    norm: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None = None,
    *,
    eps: float,
) -> None:
    """Norms and rotates `kv_down`'s output for new tokens and writes it to the caches, after each row's last token.

    Args:
        kv: (B, T, r + rope), [latent | rotary key], one of KERNEL_FLOATS.
        freqs: (B, T, rope / 2, 2) or (1, T, rope / 2, 2) float32: (cos, sin) at each token's position.
        norm: (r,), weight of the RMS norm. eps: of that norm.
        latent_cache, rope_cache, table: as in `attend_latent`; written at lengths[b] .. lengths[b] + T - 1.
        lengths: (B,) int64, the tokens that each row holds already. Tokens that do not fit the cache are not written.

    Raises:
        ValueError: an argument's shape, dtype, strides or device is not as above; under the debug switch, a length
            leaves no room for T tokens, or a table's entry is not a page.
    """
    if kv.dim() != 3 or kv.dtype not in KERNEL_FLOATS:
        raise ValueError(f"kv: got {kv.dtype} {tuple(kv.shape)}, must be (B, T, r + rope) in one of {KERNEL_FLOATS}")
    (B, T, width), r = kv.shape, norm.numel()
    rope = width - r
    _expect("norm", norm, kv.dtype, (r,), kv)
    _expect("freqs", freqs, torch.float32, (B if freqs.shape[0] != 1 else 1, T, rope // 2, 2), kv)
    _check_cache(kv, latent_cache, rope_cache, lengths, table, B, r, rope)
    _check_values(latent_cache, lengths, table, T)
    mla_append(
        kv.contiguous(),
        freqs.contiguous(),
        norm.contiguous(),
        latent_cache,
        rope_cache,
        lengths.contiguous(),
        None if table is None else table.contiguous(),
        eps,
    )


def _expect(name: str, x: Tensor, dtype: torch.dtype, shape: tuple, like: Tensor) -> None:
    if x.dtype != dtype or x.shape != shape or x.device != like.device:
        raise ValueError(
            f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, must be {dtype} {tuple(shape)} on {like.device}"
        )


def _check_cache(like, latent_cache, rope_cache, lengths, table, B, r, rope) -> None:
    _expect("lengths", lengths, torch.int64, (B,), like)
    if table is not None:
        _expect("table", table, torch.int32, (B, table.shape[-1]), like)
    rows = latent_cache.shape[:2] if table is not None else (B, latent_cache.shape[1])
    for name, cache, width in (("latent_cache", latent_cache, r), ("rope_cache", rope_cache, rope)):
        _expect(name, cache, like.dtype, (*rows, width), like)
        if cache.stride()[1:] != (width, 1) or cache.stride(0) % width:
            raise ValueError(f"{name}: got strides {cache.stride()}, each row (page) must be densely packed")


def _check_values(latent_cache, lengths, table, new: int) -> None:
    """Under the debug switch: rows have room for `new` tokens more, in pages that exist."""
    pages, page = latent_cache.shape[:2]
    most = (page if table is None else table.shape[1] * page) - new
    debug.check_values("lengths", lengths, lambda n: (n >= 0) & (n <= most), f"in [0, {most}]")
    if table is not None:

        def exist(table):
            first = torch.arange(table.shape[1], device=table.device) * page
            return (first >= lengths[:, None] + new) | (table >= 0) & (table < pages)

        debug.check_values("table", table, exist, f"in [0, {pages}) where a row has tokens")


mla_attend_latent = Op(
    "mla_attend_latent(Tensor q_latent, Tensor q_rope, Tensor latent_cache, Tensor rope_cache, Tensor lengths, "
    "Tensor? table, float scale) -> Tensor",
    fake=lambda q_latent, *_: torch.empty_like(q_latent),
    triton="openmythos_kernels.ops.mla.launch.latent:attend",
)

mla_append = Op(
    "mla_append(Tensor kv, Tensor freqs, Tensor norm, Tensor(a!) latent_cache, Tensor(b!) rope_cache, Tensor lengths, "
    "Tensor? table, float eps) -> ()",
    fake=lambda *_: None,
    triton="openmythos_kernels.ops.mla.launch.latent:append",
)
