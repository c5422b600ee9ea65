"""A counting sort of pairs by expert: count in each tile of pairs, scan over the tiles, write offsets and tiles, place.

Pairs whose expert lies outside [0, E) count as expert E, whose rows come last.
"""

import triton
import triton.language as tl


@triton.jit
def bins(expert_idx, p, P, E: tl.constexpr):
    """The experts of pairs p: E for an index out of range, -1 past the last pair."""
    e = tl.load(expert_idx + p, mask=p < P, other=-1)
    e = tl.where((e >= 0) & (e < E), e, E).to(tl.int32)
    return tl.where(p < P, e, -1)


@triton.jit(do_not_specialize=["P"])
def count_kernel(expert_idx, counts, P, E: tl.constexpr, PAIRS: tl.constexpr, E_BLOCK: tl.constexpr):
    """Grid: (ceil(P / PAIRS), ceil((E + 1) / E_BLOCK)). counts[t, e] = pairs of tile t that chose e."""
    t = tl.program_id(0)
    e = tl.program_id(1) * E_BLOCK + tl.arange(0, E_BLOCK)
    b = bins(expert_idx, t * PAIRS + tl.arange(0, PAIRS), P, E)
    count = tl.sum((b[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + t.to(tl.int64) * (E + 1) + e, count, mask=e <= E)


@triton.jit(do_not_specialize=["T"])
def scan_kernel(counts, totals, T, E: tl.constexpr, ROWS: tl.constexpr, E_BLOCK: tl.constexpr):
    """Grid: (ceil((E + 1) / E_BLOCK),). counts[t, e] becomes the sum over the tiles before t;
    totals[e] is the sum over all."""
    e = tl.program_id(0) * E_BLOCK + tl.arange(0, E_BLOCK)
    before = tl.zeros((E_BLOCK,), tl.int32)
    for first in range(0, T, ROWS):
        t = first + tl.arange(0, ROWS)
        at = counts + t.to(tl.int64)[:, None] * (E + 1) + e[None, :]
        here = (t < T)[:, None] & (e <= E)[None, :]
        count = tl.load(at, mask=here, other=0)
        tl.store(at, tl.cumsum(count, 0) - count + before[None, :], mask=here)
        before += tl.sum(count, 0)
    tl.store(totals + e, before, mask=e <= E)


@triton.jit(do_not_specialize=["BOUND"])
def tiles_kernel(
    totals, offsets, tiles, BOUND, E: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, E_BLOCK: tl.constexpr
):
    """Grid: (ceil(BOUND / SLOTS),). A program finds the expert and the first row of SLOTS tiles; the first program
    also writes offsets."""
    e = tl.arange(0, E_BLOCK)
    count = tl.load(totals + e, mask=e < E, other=0)
    last = tl.cumsum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets + e, last - count, mask=e <= E)
    used = (count + BLOCK - 1) // BLOCK
    stop = tl.cumsum(used, 0)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    mine = (slot[:, None] >= (stop - used)[None, :]) & (slot[:, None] < stop[None, :])
    first = (last - count)[None, :] + (slot[:, None] - (stop - used)[None, :]) * BLOCK
    expert = tl.sum(((stop[None, :] <= slot[:, None]) & (e < E)[None, :]).to(tl.int32), 1)
    tl.store(tiles + slot * 2, expert, mask=slot < BOUND)
    tl.store(tiles + slot * 2 + 1, tl.sum(tl.where(mine, first, 0), 1), mask=slot < BOUND)


@triton.jit(do_not_specialize=["P"])
def place_kernel(expert_idx, counts, offsets, pair, row, P, E: tl.constexpr, PAIRS: tl.constexpr):
    """Grid: (ceil(P / PAIRS),). A pair's row is its expert's offset, plus the expert's pairs in earlier tiles, plus
    those before it in its own tile."""
    t = tl.program_id(0)
    i = tl.arange(0, PAIRS)
    p = t * PAIRS + i
    b = bins(expert_idx, p, P, E)
    rank = tl.sum(((b[:, None] == b[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    here = p < P
    r = (
        tl.load(offsets + b, mask=here, other=0)
        + tl.load(counts + t.to(tl.int64) * (E + 1) + b, mask=here, other=0)
        + rank
    )
    tl.store(row + p, r, mask=here)
    tl.store(pair + r, p, mask=here)
