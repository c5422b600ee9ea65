"""Experts, forward: x -> silu(gate x) * up x -> down -> sum over a token's experts."""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import expert_tile, matrix_of, places, product, silu, token_of


@triton.jit
def gate_and_up(
    x, valid, gate, up, c, D: tl.constexpr, I: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """gate x and up x for the rows at pointers x (BM, 1) and inner channels c; x is read once for both."""
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    d = tl.arange(0, BK)
    at = places(c, I, D)[None, :] * D + d[:, None]  # (BK, BN): weights are (I, D)
    for k in range(0, D, BK):
        rows = tl.load(x + (k + d)[None, :], mask=valid[:, None] & (k + d < D)[None, :], other=0.0)
        here = (c < I)[None, :] & (k + d < D)[:, None]
        g = product(g, rows, tl.load(gate + at + k, mask=here, other=0.0))
        u = product(u, rows, tl.load(up + at + k, mask=here, other=0.0))
    return g, u


@triton.jit(do_not_specialize=["N", "R"])
def up_kernel(
    x,
    tiles,
    offsets,
    pair,
    gate,
    gate_offsets,
    up,
    up_offsets,
    act,
    pre,
    N,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAVE: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (tiles * ceil(I / BN),), inner channels fastest. act[r] = silu(gate x) * up x, rows of x are gathered.

    R: all rows. SAVE: also writes the pre-activation, pre (2, R, I). E: experts, or parts if DENSE.
    """
    columns: tl.constexpr = (I + BN - 1) // BN
    e, first, end = expert_tile(tl.program_id(0) // columns, tiles, offsets, N, E, BM, DENSE)
    if e >= E:
        return
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    r = first + tl.arange(0, BM)
    valid = r < end
    token = token_of(r, valid, e, pair, N, K, DENSE)
    g, u = gate_and_up(
        x + token[:, None] * D,
        valid,
        matrix_of(gate, gate_offsets, e, ALIGNED),
        matrix_of(up, up_offsets, e, ALIGNED),
        c,
        D,
        I,
        BM,
        BN,
        BK,
    )
    at = r.to(tl.int64)[:, None] * I + c[None, :]
    here = valid[:, None] & (c < I)[None, :]
    if SAVE:
        tl.store(pre + at, g.to(pre.dtype.element_ty), mask=here)
        tl.store(pre + R.to(tl.int64) * I + at, u.to(pre.dtype.element_ty), mask=here)
    tl.store(act + at, (silu(g) * u).to(act.dtype.element_ty), mask=here)


@triton.jit
def from_inner(acc, act, valid, down, c, D: tl.constexpr, I: tl.constexpr, BK: tl.constexpr):
    """acc + act @ down^T for the rows at pointers act (BM, 1) and model channels c."""
    i = tl.arange(0, BK)
    at = places(c, D, I)[None, :] * I + i[:, None]  # (BK, BN): weights are (D, I)
    for k in range(0, I, BK):
        rows = tl.load(act + (k + i)[None, :], mask=valid[:, None] & (k + i < I)[None, :], other=0.0)
        here = (c < D)[None, :] & (k + i < I)[:, None]
        acc = product(acc, rows, tl.load(down + at + k, mask=here, other=0.0))
    return acc


@triton.jit(do_not_specialize=["N"])
def down_kernel(
    act,
    tiles,
    offsets,
    down,
    down_offsets,
    y,
    N,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (tiles * ceil(D / BN),), model channels fastest. y[r] = down act[r]; `combine_kernel` weights it.

    DENSE: a row is a token and y[n] the sum over all E parts, as of one wide expert; act is (E, N, I).
    """
    columns: tl.constexpr = (D + BN - 1) // BN
    tile = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if DENSE:
        r = tile * BM + tl.arange(0, BM)
        valid = r < N
        for e in range(E):
            row = act + (r + e * N).to(tl.int64)[:, None] * I
            acc = from_inner(acc, row, valid, matrix_of(down, down_offsets, e, ALIGNED), c, D, I, BK)
    else:
        e, first, end = expert_tile(tile, tiles, offsets, N, E, BM, False)
        if e >= E:
            return
        r = first + tl.arange(0, BM)
        valid = r < end
        row = act + r.to(tl.int64)[:, None] * I
        acc = from_inner(acc, row, valid, matrix_of(down, down_offsets, e, ALIGNED), c, D, I, BK)
    here = valid[:, None] & (c < D)[None, :]
    tl.store(y + r.to(tl.int64)[:, None] * D + c[None, :], acc.to(y.dtype.element_ty), mask=here)


@triton.jit
def combine_kernel(
    rows,
    topk_weights,
    where,
    offsets,
    extra,
    y,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SORTED: tl.constexpr,
    GATED: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (N * ceil(D / BLOCK),). y[n] = sum_k topk_weights[n, k] * rows[row of (n, k)] + extra[n], in float32, k in
    order.

    SORTED: `where` is Order.row and `offsets` is Order.offsets; rows from offsets[E] on belong to no expert. Else rows
    are pairs and `where` is expert_idx. Without GATED the rows are summed as they are.
    """
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // columns).to(tl.int64)
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if SORTED:
        end = tl.load(offsets + E)
    for k in range(K):
        p = n * K + k
        at = tl.load(where + p)
        if SORTED:
            r = at.to(tl.int64)
            valid = at < end
        else:
            r = p
            valid = (at >= 0) & (at < E)
        row = tl.load(rows + r * D + c, mask=c < tl.where(valid, D, 0), other=0.0).to(tl.float32)
        if GATED:
            row *= tl.where(valid, tl.load(topk_weights + p).to(tl.float32), 0.0)
        acc += row
    if EXTRA:
        acc += tl.load(extra + n * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + c, acc.to(y.dtype.element_ty), mask=c < D)
