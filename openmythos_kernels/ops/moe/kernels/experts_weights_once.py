"""Gradients of routed experts' weights over several calls: as in `experts_weights.py`, summed over all calls' rows.

The calls' rows lie one after the other. Call c has the tokens [starts[c], starts[c + 1]), and each of its arrays begins
where that of call c - 1 ends: x and dy (tokens, D), dpre (2, tokens * K, I), act (tokens * K, I), pair (tokens * K,);
offsets is (calls, E + 1). The gradients of an expert without rows are written as zeros.

A file of its own, so that the kernels in use stay as a GPU has run them. With one call these are those without ADD.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import token_of


@triton.jit
def _rows(call, e, starts, offsets, E: tl.constexpr):
    """Of expert e in a call: its first row and the end; and the tokens before the call, and in it."""
    before = tl.load(starts + call)
    at = offsets + call * (E + 1) + e
    return tl.load(at), tl.load(at + 1), before, tl.load(starts + call + 1) - before


@triton.jit
def up_weights_once_kernel(
    x,
    dpre,
    offsets,
    pair,
    starts,
    dgate,
    dup,
    calls,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (E * ceil(I / BM) * ceil(D / BN),). dgate, dup (E, I, D): dpre^T x; x is gathered once for both."""
    columns: tl.constexpr = (D + BN - 1) // BN
    blocks: tl.constexpr = (I + BM - 1) // BM * columns
    e = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    for call in range(calls):
        first, end, before, tokens = _rows(call, e, starts, offsets, E)
        for start in range(first, end, BK):
            r = start + tl.arange(0, BK)
            valid = r < end
            token = before + token_of(r, valid, e, pair + before * K, tokens, K, False)
            rows = tl.load(x + token[:, None] * D + c[None, :], mask=valid[:, None] & (c < D)[None, :], other=0.0)
            z = dpre + (2 * K * before + r)[None, :] * I + i[:, None]  # (BM, BK): dpre^T
            here = (i < I)[:, None] & valid[None, :]
            g = tl.dot(tl.load(z, mask=here, other=0.0), rows, g, input_precision="ieee")
            u = tl.dot(tl.load(z + tokens * K * I, mask=here, other=0.0), rows, u, input_precision="ieee")
    at = (e.to(tl.int64) * I + i)[:, None] * D + c[None, :]
    here = (i < I)[:, None] & (c < D)[None, :]
    tl.store(dgate + at, g.to(dgate.dtype.element_ty), mask=here)
    tl.store(dup + at, u.to(dup.dtype.element_ty), mask=here)


@triton.jit
def down_weights_once_kernel(
    dy,
    act,
    offsets,
    pair,
    starts,
    ddown,
    calls,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (E * ceil(D / BM) * ceil(I / BN),). ddown (E, D, I): dy^T act; dy is gathered."""
    columns: tl.constexpr = (I + BN - 1) // BN
    blocks: tl.constexpr = (D + BM - 1) // BM * columns
    e = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks // columns * BM + tl.arange(0, BM)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for call in range(calls):
        first, end, before, tokens = _rows(call, e, starts, offsets, E)
        for start in range(first, end, BK):
            r = start + tl.arange(0, BK)
            valid = r < end
            token = before + token_of(r, valid, e, pair + before * K, tokens, K, False)
            # (BM, BK): dy^T
            g = tl.load(dy + token[None, :] * D + d[:, None], mask=(d < D)[:, None] & valid[None, :], other=0.0)
            a = act + (K * before + r)[:, None] * I + c[None, :]
            a = tl.load(a, mask=valid[:, None] & (c < I)[None, :], other=0.0)
            acc = tl.dot(g, a, acc, input_precision="ieee")
    at = (e.to(tl.int64) * D + d)[:, None] * I + c[None, :]
    tl.store(ddown + at, acc.to(ddown.dtype.element_ty), mask=(d < D)[:, None] & (c < I)[None, :])
