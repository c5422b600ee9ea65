"""Gradients of the experts' weights: a program owns a block of one expert's matrix and sums over the expert's rows.

The gradients of an expert without rows are written as zeros. ADD: gradients are added to those in memory, and an expert
without rows costs nothing. With `starts`, rows of several calls lie one after the other and a program sums over all of
them: call c has the tokens [starts[c], starts[c + 1]), and each of its arrays begins where that of call c - 1 ends.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import token_of


@triton.jit
def rows_of(e, offsets, N, DENSE: tl.constexpr):
    """The rows of expert (part) e."""
    if DENSE:
        first = e * N
        end = e * N + N
    else:
        first = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
    return first, end


@triton.jit
def rows_of_call(call, e, offsets, starts, N, E: tl.constexpr, DENSE: tl.constexpr):
    """The rows of expert (part) e in a call, the tokens before it and its own."""
    if starts is None:
        first, end = rows_of(e, offsets, N, DENSE)
        before = 0
        tokens = N
    else:
        first, end = rows_of(e, offsets + call * (E + 1), N, DENSE)
        before = tl.load(starts + call)
        tokens = tl.load(starts + call + 1) - before
    return first, end, before, tokens


@triton.jit
def token_of_call(r, valid, e, pair, before, starts, N, K: tl.constexpr, DENSE: tl.constexpr):
    """The token of each row, int64, counted over all calls."""
    if starts is None:
        return token_of(r, valid, e, pair, N, K, DENSE)
    else:
        return before + token_of(r, valid, e, pair + before * K, N, K, DENSE)


@triton.jit
def touched(e, offsets, N, columns: tl.constexpr, DENSE: tl.constexpr, ADD: tl.constexpr):
    """The number of columns of an expert's matrix that are written."""
    if ADD:
        first, end = rows_of(e, offsets, N, DENSE)
        return tl.where(first < end, columns, 0)
    else:
        return columns


@triton.jit
def store_sum(at, value, here, ADD: tl.constexpr):
    if ADD:
        value += tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, value.to(at.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["N", "R"])
def up_weights_kernel(
    x,
    dpre,
    offsets,
    pair,
    dgate,
    dup,
    starts,
    calls,
    N,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    DENSE: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (E * ceil(I / BM) * ceil(D / BN),). dgate, dup (E, I, D): dpre^T x over the expert's rows; x is gathered
    once for both. Of each call: dpre (2, R, I), offsets (E + 1,), pair (R,)."""
    columns: tl.constexpr = (D + BN - 1) // BN
    blocks: tl.constexpr = (I + BM - 1) // BM * columns
    e = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    for call in range(calls):
        first, end, before, tokens = rows_of_call(call, e, offsets, starts, N, E, DENSE)
        up_part = (R if starts is None else tokens * K).to(tl.int64) * I
        for start in range(first, end, BK):
            r = start + tl.arange(0, BK)
            valid = r < end
            token = token_of_call(r, valid, e, pair, before, starts, N, K, DENSE)
            rows = tl.load(x + token[:, None] * D + c[None, :], mask=valid[:, None] & (c < D)[None, :], other=0.0)
            z = dpre + (2 * K * before + r.to(tl.int64))[None, :] * I + i[:, None]  # (BM, BK): dpre^T
            here = (i < I)[:, None] & valid[None, :]
            g = tl.dot(tl.load(z, mask=here, other=0.0), rows, g, input_precision="ieee")
            u = tl.dot(tl.load(z + up_part, mask=here, other=0.0), rows, u, input_precision="ieee")
    at = (e.to(tl.int64) * I + i)[:, None] * D + c[None, :]
    here = (i < I)[:, None] & (c < touched(e, offsets, N, D, DENSE, ADD))[None, :]
    store_sum(dgate + at, g, here, ADD)
    store_sum(dup + at, u, here, ADD)


@triton.jit(do_not_specialize=["N"])
def down_weights_kernel(
    dy,
    act,
    offsets,
    pair,
    ddown,
    starts,
    calls,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    DENSE: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (E * ceil(D / BM) * ceil(I / BN),). ddown (E, D, I): dy^T act over the expert's rows; dy is gathered."""
    columns: tl.constexpr = (I + BN - 1) // BN
    blocks: tl.constexpr = (D + BM - 1) // BM * columns
    e = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for call in range(calls):
        first, end, before, _ = rows_of_call(call, e, offsets, starts, N, E, DENSE)
        for start in range(first, end, BK):
            r = start + tl.arange(0, BK)
            valid = r < end
            token = token_of_call(r, valid, e, pair, before, starts, N, K, DENSE)
            # (BM, BK): dy^T
            g = tl.load(dy + token[None, :] * D + d[:, None], mask=(d < D)[:, None] & valid[None, :], other=0.0)
            a = act + (K * before + r.to(tl.int64))[:, None] * I + c[None, :]
            a = tl.load(a, mask=valid[:, None] & (c < I)[None, :], other=0.0)
            acc = tl.dot(g, a, acc, input_precision="ieee")
    at = (e.to(tl.int64) * D + d)[:, None] * I + c[None, :]
    here = (d < D)[:, None] & (c < touched(e, offsets, N, I, DENSE, ADD))[None, :]
    store_sum(ddown + at, acc, here, ADD)
