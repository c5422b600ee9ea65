"""Gradients of the experts' weights: a program owns a block of one expert's matrix and sums over the expert's rows.

The gradients of an expert without rows are written as zeros. ADD: gradients are added to those in memory, and an expert
without rows costs nothing.
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
def touched(first, end, columns: tl.constexpr, ADD: tl.constexpr):
    """The number of columns of an expert's matrix that are written."""
    if ADD:
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
    N,
    R,
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
    once for both."""
    columns: tl.constexpr = (D + BN - 1) // BN
    blocks: tl.constexpr = (I + BM - 1) // BM * columns
    e = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    first, end = rows_of(e, offsets, N, DENSE)
    up_part = R.to(tl.int64) * I
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    for start in range(first, end, BK):
        r = start + tl.arange(0, BK)
        valid = r < end
        token = token_of(r, valid, e, pair, N, K, DENSE)
        rows = tl.load(x + token[:, None] * D + c[None, :], mask=valid[:, None] & (c < D)[None, :], other=0.0)
        z = dpre + r.to(tl.int64)[None, :] * I + i[:, None]  # (BM, BK): dpre^T
        here = (i < I)[:, None] & valid[None, :]
        g = tl.dot(tl.load(z, mask=here, other=0.0), rows, g, input_precision="ieee")
        u = tl.dot(tl.load(z + up_part, mask=here, other=0.0), rows, u, input_precision="ieee")
    at = (e.to(tl.int64) * I + i)[:, None] * D + c[None, :]
    here = (i < I)[:, None] & (c < touched(first, end, D, ADD))[None, :]
    store_sum(dgate + at, g, here, ADD)
    store_sum(dup + at, u, here, ADD)


@triton.jit(do_not_specialize=["N"])
def down_weights_kernel(
    dy,
    act,
    offsets,
    pair,
    ddown,
    N,
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
    first, end = rows_of(e, offsets, N, DENSE)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(first, end, BK):
        r = start + tl.arange(0, BK)
        valid = r < end
        token = token_of(r, valid, e, pair, N, K, DENSE)
        # (BM, BK): dy^T
        g = tl.load(dy + token[None, :] * D + d[:, None], mask=(d < D)[:, None] & valid[None, :], other=0.0)
        a = act + r.to(tl.int64)[:, None] * I + c[None, :]
        a = tl.load(a, mask=valid[:, None] & (c < I)[None, :], other=0.0)
        acc = tl.dot(g, a, acc, input_precision="ieee")
    at = (e.to(tl.int64) * D + d)[:, None] * I + c[None, :]
    here = (d < D)[:, None] & (c < touched(first, end, I, ADD))[None, :]
    store_sum(ddown + at, acc, here, ADD)
