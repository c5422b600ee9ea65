"""`openmythos::moe_sort`: (token, slot) pairs sorted by expert, for kernels that work expert by expert.

The host reads nothing: all sizes follow from N, K, E and the rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.op import LIBRARY, Op


class Order(NamedTuple):
    """Pair p = token * K + slot is row `row[p]` of the sorted order; row r is pair `pair[r]`. All int32.

    Attributes:
        offsets: (E + 1,): expert e owns the rows [offsets[e], offsets[e + 1]).
        pair: (N * K,): row -> pair. The sort is stable.
        row: (N * K,): pair -> row.
        tiles: (T, 2) with T = tile_bound(N * K, E, block): (expert, first row) of each tile, which has at most `block`
            rows, all of one expert; then (E, 0) to the end.

    Pairs whose expert is outside [0, E) come last, from row offsets[E] on, and belong to no expert and no tile.
    """

    offsets: Tensor
    pair: Tensor
    row: Tensor
    tiles: Tensor


def tile_bound(pairs: int, experts: int, block: int) -> int:
    """The most tiles that any routing can need: all full tiles, and a partly filled one for each expert."""
    return -(-pairs // block) + experts


def moe_sort(expert_idx: Tensor, experts: int, block: int) -> Order:
    """Sorts pairs by expert, stably.

    Args:
        expert_idx: (N, K) int64; N * K below 2^31.
        experts: E >= 1.
        block: rows of a tile, a power of two.

    Raises:
        ValueError: an argument is not as above.
    """
    if expert_idx.dim() != 2 or expert_idx.dtype != torch.int64 or expert_idx.numel() >= 2**31:
        raise ValueError(
            f"expert_idx: got {expert_idx.dtype} {tuple(expert_idx.shape)}, "
            "must be int64 (N, K) of less than 2^31 elements"
        )
    if experts < 1 or block < 1 or block & (block - 1):
        raise ValueError(f"experts = {experts}, block = {block}: must be at least 1, and block a power of two")
    return Order(*_sort(expert_idx.contiguous(), experts, block))


def _fake(expert_idx, experts, block):
    pairs = expert_idx.numel()
    shapes = ((experts + 1,), (pairs,), (pairs,), (tile_bound(pairs, experts, block), 2))
    return tuple(expert_idx.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _plain(expert_idx, experts, block):
    flat = expert_idx.flatten()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    pair = flat.argsort(stable=True)
    row = torch.empty_like(pair)
    row[pair] = torch.arange(flat.numel(), device=flat.device)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    offsets = counts.cumsum(0) - counts
    used = (counts[:experts] + block - 1) // block  # tiles of each expert
    last = used.cumsum(0)
    tile = torch.arange(tile_bound(flat.numel(), experts, block), device=flat.device)
    expert = torch.searchsorted(last, tile, right=True)
    at = expert.clamp(max=experts - 1)
    first = torch.where(expert < experts, offsets[at] + (tile - last[at] + used[at]) * block, 0)
    return tuple(t.int() for t in (offsets, pair, row, torch.stack([expert, first], dim=1)))


_sort = Op(
    "moe_sort(Tensor expert_idx, int experts, int block) -> (Tensor offsets, Tensor pair, Tensor row, Tensor tiles)",
    fake=_fake,
    triton="openmythos_kernels.ops.moe.launch.sort:forward",
    formula=_plain,
)
# For devices without a kernel of their own.
LIBRARY.impl("moe_sort", _plain, "CompositeExplicitAutograd")
