"""Launch of the sort by expert: four kernels, whatever N, K and E."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.moe.kernels.sort import count_kernel, place_kernel, scan_kernel, tiles_kernel
from openmythos_kernels.ops.moe.sort import Order, tile_bound

_PAIRS = 128  # pairs of a tile; ranks inside it come from comparing all with all
_EXPERTS = 64  # experts counted at a time


def forward(expert_idx, experts, block):
    """`openmythos::moe_sort`."""

    def empty(*shape):
        return expert_idx.new_empty(shape, dtype=torch.int32)

    pairs = expert_idx.numel()
    spread = triton.cdiv(pairs, _PAIRS)
    bound = tile_bound(pairs, experts, block)
    order = Order(empty(experts + 1), empty(pairs), empty(pairs), empty(bound, 2))
    counts, totals = empty(spread, experts + 1), empty(experts + 1)
    columns = triton.cdiv(experts + 1, _EXPERTS)
    wide = triton.next_power_of_2(experts + 1)
    slots = max(1, (4096 if wide <= 512 else 2048) // wide)  # the larger tile spills at 1024 experts
    if pairs:
        count_kernel[(spread, columns)](expert_idx, counts, pairs, experts, _PAIRS, _EXPERTS)
    scan_kernel[(columns,)](counts, totals, spread, experts, 16, _EXPERTS)
    tiles_kernel[(triton.cdiv(bound, slots),)](totals, order.offsets, order.tiles, bound, experts, block, slots, wide)
    if pairs:
        place_kernel[(spread,)](expert_idx, counts, order.offsets, order.pair, order.row, pairs, experts, _PAIRS)
    return order
