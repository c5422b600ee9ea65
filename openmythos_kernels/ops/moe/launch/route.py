"""Launches of routing."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.moe.kernels.route import route_backward_kernel, route_kernel


def forward(logits, bias, k):
    """`openmythos::moe_route`."""
    check_for_triton("logits", logits)
    N, E = logits.shape
    topk_weights = logits.new_empty(N, k)
    expert_idx = logits.new_empty((N, k), dtype=torch.int64)
    load = logits.new_zeros(E, dtype=torch.int64)
    if N:
        rows, blocks = _tile(E, k)
        route_kernel[(triton.cdiv(N, rows),)](
            logits, bias, topk_weights, expert_idx, load, N, E, k, bias.dtype == logits.dtype, rows, *blocks
        )
    return topk_weights, expert_idx, load


def backward(dtopk_weights, expert_idx, topk_weights, experts):
    """`openmythos::moe_route_backward`."""
    check_for_triton("topk_weights", topk_weights)
    N, k = topk_weights.shape
    dlogits = topk_weights.new_empty(N, experts)
    if N:
        rows, blocks = _tile(experts, k)
        route_backward_kernel[(triton.cdiv(N, rows),)](
            dtopk_weights, topk_weights, expert_idx, dlogits, N, experts, k, rows, *blocks
        )
    return dlogits


def _tile(experts: int, k: int) -> tuple[int, tuple[int, int]]:
    """The tokens of a program, 1024 logits or 8 a thread so that all stay in registers; and the padded E and k."""
    wide = triton.next_power_of_2(experts)
    return max(1, 1024 // wide), (wide, triton.next_power_of_2(k))
