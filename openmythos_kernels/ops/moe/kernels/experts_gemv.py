"""Experts for at most BM tokens, without sorting: the weights of the chosen experts are streamed once.

The program of a pair computes its expert for all tokens, unless an earlier pair chose the same expert; then it returns.
With so few rows the time is that of reading the weights, and the unused rows of a tile cost nothing.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.experts import from_inner, gate_and_up
from openmythos_kernels.ops.moe.kernels.tiles import matrix_of, silu


@triton.jit
def first_of(expert_idx, p, P, PAIRS: tl.constexpr):
    """The expert of pair p, or -1 if an earlier pair has the same expert."""
    e = tl.load(expert_idx + p)
    before = 0
    for q in range(0, p, PAIRS):
        i = q + tl.arange(0, PAIRS)
        before += tl.sum((tl.load(expert_idx + i, mask=i < p, other=-1) == e).to(tl.int32), 0)
    return tl.where(before == 0, e, -1)


@triton.jit
def chosen_by(expert_idx, e, n, N, K: tl.constexpr):
    """Whether each token chose e."""
    chosen = n < 0
    for k in range(K):
        chosen = chosen | (tl.load(expert_idx + n * K + k, mask=n < N, other=-1) == e)
    return chosen


@triton.jit(do_not_specialize=["N"])
def few_up_kernel(
    x,
    expert_idx,
    gate,
    gate_offsets,
    up,
    up_offsets,
    act,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (N * K * ceil(I / BN),). act[p] = silu(gate x) * up x for every pair p of the expert."""
    columns: tl.constexpr = (I + BN - 1) // BN
    e = first_of(expert_idx, tl.program_id(0) // columns, N * K, 64)
    if (e < 0) | (e >= E):
        return
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    n = tl.arange(0, BM)
    chosen = chosen_by(expert_idx, e, n, N, K)
    g, u = gate_and_up(
        x + n[:, None] * D,
        chosen,
        matrix_of(gate, gate_offsets, e, ALIGNED),
        matrix_of(up, up_offsets, e, ALIGNED),
        c,
        D,
        I,
        BM,
        BN,
        BK,
    )
    result = (silu(g) * u).to(act.dtype.element_ty)
    for k in range(K):
        mine = tl.load(expert_idx + n * K + k, mask=n < N, other=-1) == e
        tl.store(act + (n * K + k)[:, None] * I + c[None, :], result, mask=mine[:, None] & (c < I)[None, :])


@triton.jit(do_not_specialize=["N"])
def few_down_kernel(
    act,
    expert_idx,
    down,
    down_offsets,
    y,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (N * K * ceil(D / BN),). y[p] = down act[p] for every pair p of the expert."""
    columns: tl.constexpr = (D + BN - 1) // BN
    e = first_of(expert_idx, tl.program_id(0) // columns, N * K, 64)
    if (e < 0) | (e >= E):
        return
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    n = tl.arange(0, BM)
    chosen = chosen_by(expert_idx, e, n, N, K)
    slot = tl.zeros((BM,), tl.int32)  # a slot in which the token chose e; all of them have the same activations
    for k in range(K):
        slot = tl.where(tl.load(expert_idx + n * K + k, mask=n < N, other=-1) == e, k, slot)
    acc = tl.zeros((BM, BN), tl.float32)
    rows = act + (n * K + slot)[:, None] * I
    acc = from_inner(acc, rows, chosen, matrix_of(down, down_offsets, e, ALIGNED), c, D, I, BK)
    result = acc.to(y.dtype.element_ty)
    for k in range(K):
        mine = tl.load(expert_idx + n * K + k, mask=n < N, other=-1) == e
        tl.store(y + (n * K + k)[:, None] * D + c[None, :], result, mask=mine[:, None] & (c < D)[None, :])
