"""Launches of attention over a cache of latents, and of the append to it."""

from __future__ import annotations

import math

import torch
import triton

from openmythos_kernels.ops.mla import configs
from openmythos_kernels.ops.mla.kernels.latent import attend_latent_kernel, merge_kernel
from openmythos_kernels.ops.mla.kernels.norm_rope import append_kernel
from openmythos_kernels.ops.mla.launch.norm_rope import constants, freqs_rows
from openmythos_kernels.runtime import target


def attend(q_latent, q_rope, latent_cache, rope_cache, lengths, table, scale):
    """`openmythos::mla_attend_latent`."""
    B, H, r = q_latent.shape
    out = torch.empty_like(q_latent)
    if not out.numel():
        return out
    means, lse = attend_parts(q_latent, q_rope, latent_cache, rope_cache, lengths, table, scale, _splits, out)
    if means is not out:
        block = min(512, configs.power(r))
        merge_kernel[(B * H, triton.cdiv(r, block))](means, lse, out, B * H, len(means), R=r, BLOCK=block)
    return out


def attend_parts(q_latent, q_rope, latent_cache, rope_cache, lengths, table, scale, splits_of, out=None):
    """The means of each split of the keys, (splits, B, H, r) float32, and the base-2 logarithms of their weights,
    (splits, B, H) float32. A single split goes to `out`, if there is one, which is then returned in place of both.

    splits_of: (programs, capacity, keys of a tile) -> number of splits.
    """
    B, H, r = q_latent.shape
    rope = q_rope.shape[-1]
    config = configs.latent(q_latent.element_size(), H, r)
    page, pages, capacity = _layout(latent_cache, table)
    chunks = triton.cdiv(r, config.block_r)
    programs = B * triton.cdiv(H, config.block_h) * chunks
    splits = splits_of(programs, capacity, config.block_n)
    merges = splits > 1 or out is None
    if merges:
        means = q_latent.new_empty((splits, B, H, r), dtype=torch.float32)
        lse = q_latent.new_empty((splits, B, H), dtype=torch.float32)
    else:
        means, lse = out, out  # the kernel does not write lse
    attend_latent_kernel[(programs, splits)](
        q_latent,
        q_rope,
        latent_cache,
        rope_cache,
        lengths,
        lengths if table is None else table,
        means,
        lse,
        B,
        capacity,
        pages,
        splits,
        latent_cache.stride(0),
        rope_cache.stride(0),
        scale * math.log2(math.e),
        H=H,
        R=r,
        ROPE=rope,
        PAGE=page,
        R_BLOCK=config.block_r,
        ROPE_BLOCK=configs.power(rope),
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        CHUNKS=chunks,
        MERGE=merges,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return means, lse


def _splits(programs: int, capacity: int, block_n: int) -> int:
    """The number of splits of the keys: enough to keep all multiprocessors busy, with at least four tiles each.

    Computed from the cache's capacity, as only the device knows the lengths. Short rows leave splits empty, which costs
    little.
    """
    return max(1, min(target.current().units // programs, capacity // (4 * block_n), 128))


def _layout(latent_cache, table) -> tuple[int, int, int]:
    """Tokens of a page and pages of a row, both 0 for a dense cache; the tokens that a row has room for."""
    if table is None:
        return 0, 0, latent_cache.shape[1]
    page, pages = latent_cache.shape[1], table.shape[1]
    return page, pages, page * pages


def append(kv, freqs, norm, latent_cache, rope_cache, lengths, table, eps):
    """`openmythos::mla_append`."""
    B, T, width = kv.shape
    r = norm.shape[0]
    if not B * T:
        return
    page, pages, capacity = _layout(latent_cache, table)
    append_kernel[(B * T,)](
        kv,
        freqs,
        norm,
        latent_cache,
        rope_cache,
        lengths,
        lengths if table is None else table,
        T,
        freqs_rows(freqs),
        capacity,
        pages,
        latent_cache.stride(0),
        rope_cache.stride(0),
        eps,
        PAGE=page,
        **constants(r, width - r, freqs),
    )
