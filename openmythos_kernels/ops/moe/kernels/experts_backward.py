"""Experts, backward to the activations: dy -> d(pre-activation) and dtopk_weights -> dx.

Of the forward only x, the pre-activation and the routing are read. The gradient of a topk_weight is
<dy, expert output> = <down^T dy, activation>, and the activation is recomputed from the pre-activation (as in SonicMoE,
arXiv 2512.14080).
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import (
    expert_tile,
    matrix_of,
    places,
    product,
    silu,
    swiglu_gradients,
    token_of,
)


@triton.jit(do_not_specialize=["N", "R"])
def down_backward_kernel(
    dy,
    tiles,
    offsets,
    pair,
    topk_weights,
    down,
    down_offsets,
    pre,
    dpre,
    act,
    dgate_parts,
    N,
    R,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (tiles * ceil(I / BN),), inner channels fastest. With dact = down^T dy[token], rows of dy gathered:

    dpre (2, R, I): topk_weight * dact through the activation, for gate and up; act (R, I): topk_weight * activation,
    which the gradient of `down` needs; dgate_parts (columns, R) float32: <dact, activation> over the program's
    channels. DENSE: topk_weights are one and have no gradient.
    """
    columns: tl.constexpr = (I + BN - 1) // BN
    column = tl.program_id(0) % columns
    e, first, end = expert_tile(tl.program_id(0) // columns, tiles, offsets, N, E, BM, DENSE)
    if e >= E:
        return
    c = column * BN + tl.arange(0, BN)
    r = first + tl.arange(0, BM)
    valid = r < end
    token = token_of(r, valid, e, pair, N, K, DENSE)

    d = tl.arange(0, BK)
    rows = dy + token[:, None] * D
    weight = (
        matrix_of(down, down_offsets, e, ALIGNED) + places(d, D, I)[:, None] * I + c[None, :]
    )  # (BK, BN): down is (D, I)
    dact = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        g = tl.load(rows + (k + d)[None, :], mask=valid[:, None] & (k + d < D)[None, :], other=0.0)
        w = tl.load(weight + places(k, D, I) * I, mask=(c < I)[None, :] & (k + d < D)[:, None], other=0.0)
        dact = product(dact, g, w)

    at = r.to(tl.int64)[:, None] * I + c[None, :]
    here = valid[:, None] & (c < I)[None, :]
    up_part = R.to(tl.int64) * I
    g = tl.load(pre + at, mask=here, other=0.0).to(tl.float32)
    u = tl.load(pre + up_part + at, mask=here, other=0.0).to(tl.float32)
    s = silu(g)
    if not DENSE:
        tl.store(dgate_parts + column * R.to(tl.int64) + r, tl.sum(dact * s * u, 1), mask=valid)
        gate = tl.load(topk_weights + tl.load(pair + r, mask=valid, other=0), mask=valid, other=0.0).to(tl.float32)[
            :, None
        ]
        dact *= gate
        tl.store(act + at, (gate * s * u).to(act.dtype.element_ty), mask=here)
    else:
        tl.store(act + at, (s * u).to(act.dtype.element_ty), mask=here)
    dg, du = swiglu_gradients(dact, g, u)
    tl.store(dpre + at, dg.to(dpre.dtype.element_ty), mask=here)
    tl.store(dpre + up_part + at, du.to(dpre.dtype.element_ty), mask=here)


@triton.jit
def to_input(acc, dgate, dup, valid, gate, up, c, D: tl.constexpr, I: tl.constexpr, BK: tl.constexpr):
    """acc + dgate @ gate + dup @ up for the rows at pointers dgate, dup (BM, 1) and model channels c."""
    i = tl.arange(0, BK)
    at = places(i, I, D)[:, None] * D + c[None, :]  # (BK, BN): weights are (I, D)
    for k in range(0, I, BK):
        rows = valid[:, None] & (k + i < I)[None, :]
        here = (c < D)[None, :] & (k + i < I)[:, None]
        z = tl.load(dgate + (k + i)[None, :], mask=rows, other=0.0)
        acc = product(acc, z, tl.load(gate + at + places(k, I, D) * D, mask=here, other=0.0))
        z = tl.load(dup + (k + i)[None, :], mask=rows, other=0.0)
        acc = product(acc, z, tl.load(up + at + places(k, I, D) * D, mask=here, other=0.0))
    return acc


@triton.jit(do_not_specialize=["N", "R"])
def up_backward_kernel(
    dpre,
    tiles,
    offsets,
    gate,
    gate_offsets,
    up,
    up_offsets,
    dx,
    N,
    R,
    E: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid: (tiles * ceil(D / BN),), model channels fastest. dx[r] = gate^T dpre[0, r] + up^T dpre[1, r], which
    `combine_kernel` sums over a token's rows. DENSE: a row is a token and its dx the sum over all E parts."""
    columns: tl.constexpr = (D + BN - 1) // BN
    tile = tl.program_id(0) // columns
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    up_part = R.to(tl.int64) * I
    acc = tl.zeros((BM, BN), tl.float32)
    if DENSE:
        r = tile * BM + tl.arange(0, BM)
        valid = r < N
        for e in range(E):
            row = dpre + (r + e * N).to(tl.int64)[:, None] * I
            acc = to_input(
                acc,
                row,
                row + up_part,
                valid,
                matrix_of(gate, gate_offsets, e, ALIGNED),
                matrix_of(up, up_offsets, e, ALIGNED),
                c,
                D,
                I,
                BK,
            )
    else:
        e, first, end = expert_tile(tile, tiles, offsets, N, E, BM, False)
        if e >= E:
            return
        r = first + tl.arange(0, BM)
        valid = r < end
        row = dpre + r.to(tl.int64)[:, None] * I
        acc = to_input(
            acc,
            row,
            row + up_part,
            valid,
            matrix_of(gate, gate_offsets, e, ALIGNED),
            matrix_of(up, up_offsets, e, ALIGNED),
            c,
            D,
            I,
            BK,
        )
    here = valid[:, None] & (c < D)[None, :]
    tl.store(dx + r.to(tl.int64)[:, None] * D + c[None, :], acc.to(dx.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["P"])
def gate_gradient_kernel(
    parts, row, offsets, dtopk_weights, P, E: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (ceil(P / BLOCK),). dtopk_weights[p] = sum over columns of parts[column, row of p]; zero for pairs without
    an expert."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.load(row + p, mask=p < P, other=0)
    valid = (p < P) & (r < tl.load(offsets + E))
    total = tl.zeros((BLOCK,), tl.float32)
    for column in range(COLUMNS):
        total += tl.load(parts + column * P.to(tl.int64) + r, mask=valid, other=0.0)
    tl.store(dtopk_weights + p, total.to(dtopk_weights.dtype.element_ty), mask=p < P)
