"""Launches of norm and rotation."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.mla.kernels.norm_rope import norm_rope_backward_kernel, norm_rope_kernel
from openmythos_kernels.ops.mla.launch.walk import walkable
from openmythos_kernels.runtime import target


def forward(x, freqs, weight, eps):
    """`openmythos::mla_norm_rope`."""
    B, T, width = x.shape
    r = weight.shape[0]
    normed, rotated = x.new_empty(B, T, r), x.new_empty(B, T, width - r)
    if x.numel():
        x = walkable(x)
        norm_rope_kernel[(B * T,)](
            x,
            freqs,
            weight,
            normed,
            rotated,
            T,
            freqs_rows(freqs),
            x.stride(0) // x.stride(1),
            x.stride(1),
            eps,
            **constants(r, width - r, freqs),
        )
    return normed, rotated


def backward(grad_normed, grad_rotated, x, freqs, weight, eps):
    """`openmythos::mla_norm_rope_backward`."""
    B, T, width = x.shape
    r = weight.shape[0]
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(weight)
    x = walkable(x)
    rows = B * T
    share = triton.cdiv(rows, 4 * target.current().units)
    parts = x.new_empty((triton.cdiv(rows, share), r), dtype=torch.float32)
    norm_rope_backward_kernel[(len(parts),)](
        grad_normed,
        grad_rotated,
        x,
        freqs,
        weight,
        dx,
        parts,
        rows,
        T,
        freqs_rows(freqs),
        x.stride(0) // x.stride(1),
        x.stride(1),
        share,
        eps,
        **{**constants(r, width - r, freqs), **_backward_warps(r)},
    )
    return dx, parts.sum(0).to(weight.dtype)  # in an order of the library's that is the same every time


def _backward_warps(r: int) -> dict:
    """The warps that do not spill on sm_86 and sm_89, whose compiler saves registers for 48 warps at once: four do."""
    if target.current().name != "sm_86":
        return {}
    return {512: dict(num_warps=8), 1024: dict(num_warps=2)}.get(triton.next_power_of_2(max(r, 1)), {})


def freqs_rows(freqs) -> int:
    """Rows of freqs per batch row: 0 where all share one."""
    return 0 if freqs.shape[0] == 1 else freqs.shape[1]


def constants(r: int, turned: int, freqs) -> dict:
    """What the kernels are compiled for: r channels normed, `turned` rotated."""
    pairs = turned // 2
    return dict(
        R=r,
        PAIRS=pairs,
        HALF=freqs.shape[-2],
        R_BLOCK=triton.next_power_of_2(max(r, 1)),
        PAIR_BLOCK=min(1024, triton.next_power_of_2(max(pairs, 1))),
        num_warps=4 if max(r, pairs) <= 2048 else 8,
    )
