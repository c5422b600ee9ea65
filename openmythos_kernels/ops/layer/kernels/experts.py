"""Experts of few tokens, routed and shared in one launch. As in `ops/moe/kernels/experts_gemv.py` the weights of the
chosen experts are streamed once for BM tokens, by the program of the first pair that chose the expert."""

import triton
import triton.language as tl

from openmythos_kernels.ops.layer.kernels.normed import normed_products
from openmythos_kernels.ops.layer.kernels.overlap import overlap
from openmythos_kernels.ops.moe.kernels.experts import from_inner
from openmythos_kernels.ops.moe.kernels.route import ordered
from openmythos_kernels.ops.moe.kernels.tiles import matrix_of, places, silu


@triton.jit
def top_experts(
    logits,
    bias,
    n,
    valid,
    E: tl.constexpr,
    K: tl.constexpr,
    ROUNDED: tl.constexpr,
    BM: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """The experts of tokens n, int32 and -1 where there is none, and their weights in float32: (BM, K_BLOCK) each.

    The choice is that of `ops/moe/kernels/route.py`, which says what ROUNDED is.
    """
    LOWEST: tl.constexpr = -(2**63)
    e = tl.arange(0, E_BLOCK)
    k = tl.arange(0, K_BLOCK)
    here = valid[:, None] & (e < E)[None, :]
    logit = tl.load(logits + n.to(tl.int64)[:, None] * E + e[None, :], mask=here, other=0.0).to(tl.float32)
    s = logit + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if ROUNDED:
        s = s.to(logits.dtype.element_ty).to(tl.float32)
    packed = (ordered(s).to(tl.int64) << 32) | (E_BLOCK - 1 - e)[None, :].to(tl.int64)
    packed = tl.where((e < E)[None, :], packed, LOWEST)
    idx = tl.full((BM, K_BLOCK), -1, tl.int32)
    chosen = tl.full((BM, K_BLOCK), float("-inf"), tl.float32)
    for j in range(K):
        best = E_BLOCK - 1 - (tl.max(packed, 1) & 0x7FFFFFFF).to(tl.int32)
        hit = e[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, logit, 0.0), 1)
        idx = tl.where((k == j)[None, :] & valid[:, None], best[:, None], idx)
        chosen = tl.where((k == j)[None, :], value[:, None], chosen)
        packed = tl.where(hit, LOWEST, packed)
    weight = tl.where((k < K)[None, :], tl.exp(chosen - tl.max(chosen, 1)[:, None]), 0.0)
    return idx, weight / tl.sum(weight, 1)[:, None]


@triton.jit
def expert_of(idx, p, K: tl.constexpr, BM: tl.constexpr, K_BLOCK: tl.constexpr):
    """The expert of a tile's pair p, or -1 if an earlier pair has it; which tokens chose it; and in which slot.

    idx: (BM, K_BLOCK), -1 where there is no pair.
    """
    k = tl.arange(0, K_BLOCK)[None, :]
    pair = tl.where(k < K, tl.arange(0, BM)[:, None] * K + k, BM * K)
    e = tl.max(tl.max(tl.where(pair == p, idx, -1), 1), 0)
    same = (idx == e) & (idx >= 0)
    earlier = tl.max(tl.max((same & (pair < p)).to(tl.int32), 1), 0)
    chosen = tl.max(same.to(tl.int32), 1) > 0
    slot = tl.max(tl.where(same, k, 0), 1)
    return tl.where(earlier > 0, -1, e), chosen, slot


@triton.jit
def _activated(
    x,
    valid,
    gain,
    gate,
    up,
    c,
    eps,
    D: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """silu(gate x) * up x of normed rows at pointers x, in inner channels c."""
    at = places(c, I, D)[None, :] * D
    g, u = normed_products(x, valid, gain, gate + at, up + at, c < I, eps, D, BM, BN, BK)
    return silu(g) * u


@triton.jit(do_not_specialize=["N"])
def experts_up_kernel(
    x,
    gain,
    logits,
    bias,
    gate,
    gate_offsets,
    up,
    up_offsets,
    shared_gate,
    shared_gate_offsets,
    shared_up,
    shared_up_offsets,
    act,
    shared_act,
    topk_weights,
    expert_idx,
    N,
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_ALIGNED: tl.constexpr,
    ROUNDED: tl.constexpr,
    PAIRS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Routes normed tokens, and act = silu(gate x) * up x for each pair and for each shared expert.

    Grid: (ceil(N / BM) * (PAIRS * ceil(I / BN) + SHARED * ceil(SHARED_I / BN)),). PAIRS: those of a tile. Every program
    routes its tile's tokens; the first one of each tile writes the choice. act: (N * K, I). shared_act:
    (SHARED, N, SHARED_I). Without experts (PAIRS 0) this is a dense layer with one shared expert.
    """
    overlap(OVERLAP)
    routed: tl.constexpr = PAIRS * ((I + BN - 1) // BN)
    each: tl.constexpr = routed + SHARED * ((SHARED_I + BN - 1) // BN)
    n = tl.program_id(0) // each * BM + tl.arange(0, BM)
    valid = n < N
    rows = n.to(tl.int64)
    x += rows[:, None] * D
    pid = tl.program_id(0) % each
    if PAIRS > 0:  # noqa: SIM102 - a branch of the compiler's
        if pid < routed:
            columns: tl.constexpr = (I + BN - 1) // BN
            idx, weight = top_experts(logits, bias, n, valid, E, K, ROUNDED, BM, E_BLOCK, K_BLOCK)
            if pid == 0:
                k = tl.arange(0, K_BLOCK)
                to = rows[:, None] * K + k[None, :]
                there = valid[:, None] & (k < K)[None, :]
                tl.store(topk_weights + to, weight.to(topk_weights.dtype.element_ty), mask=there)
                tl.store(expert_idx + to, idx.to(tl.int64), mask=there)
            e, chosen, slot = expert_of(idx, pid // columns, K, BM, K_BLOCK)
            if e >= 0:
                c = pid % columns * BN + tl.arange(0, BN)
                of_gate = matrix_of(gate, gate_offsets, e, ALIGNED)
                of_up = matrix_of(up, up_offsets, e, ALIGNED)
                y = _activated(x, chosen, gain, of_gate, of_up, c, eps, D, I, BM, BN, BK)
                to = act + (rows * K + slot)[:, None] * I + c[None, :]
                tl.store(to, y.to(act.dtype.element_ty), mask=chosen[:, None] & (c < I)[None, :])
    if SHARED > 0:  # noqa: SIM102 - a branch of the compiler's
        if pid >= routed:
            shared_columns: tl.constexpr = (SHARED_I + BN - 1) // BN
            e = (pid - routed) // shared_columns
            c = (pid - routed) % shared_columns * BN + tl.arange(0, BN)
            of_gate = matrix_of(shared_gate, shared_gate_offsets, e, SHARED_ALIGNED)
            of_up = matrix_of(shared_up, shared_up_offsets, e, SHARED_ALIGNED)
            y = _activated(x, valid, gain, of_gate, of_up, c, eps, D, SHARED_I, BM, BN, BK)
            to = shared_act + (tl.cast(e, tl.int64) * N + rows)[:, None] * SHARED_I + c[None, :]
            tl.store(to, y.to(shared_act.dtype.element_ty), mask=valid[:, None] & (c < SHARED_I)[None, :])


@triton.jit(do_not_specialize=["N"])
def experts_down_kernel(
    act,
    shared_act,
    expert_idx,
    down,
    down_offsets,
    shared_down,
    shared_down_offsets,
    y,
    shared_y,
    N,
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_I: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """y (N * K, D) of each pair and shared_y (SHARED, N, D), float32; who reads them weights and adds them.

    Grid: (ceil(N / BM) * (PAIRS + SHARED) * ceil(D / BN),).
    """
    overlap(OVERLAP)
    columns: tl.constexpr = (D + BN - 1) // BN
    n = tl.program_id(0) // (columns * (PAIRS + SHARED)) * BM + tl.arange(0, BM)
    valid = n < N
    rows = n.to(tl.int64)
    c = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    p = tl.program_id(0) // columns % (PAIRS + SHARED)
    if p < PAIRS:
        k = tl.arange(0, K_BLOCK)
        there = valid[:, None] & (k < K)[None, :]
        idx = tl.load(expert_idx + rows[:, None] * K + k[None, :], mask=there, other=-1).to(tl.int32)
        e, chosen, slot = expert_of(idx, p, K, BM, K_BLOCK)
        if e >= 0:
            pair = (rows * K + slot)[:, None]
            of_down = matrix_of(down, down_offsets, e, ALIGNED)
            found = from_inner(tl.zeros((BM, BN), tl.float32), act + pair * I, chosen, of_down, c, D, I, BK)
            tl.store(y + pair * D + c[None, :], found, mask=chosen[:, None] & (c < D)[None, :])
    if SHARED > 0:  # noqa: SIM102 - a branch of the compiler's
        if p >= PAIRS:
            row = (tl.cast(p - PAIRS, tl.int64) * N + rows)[:, None]
            of_down = matrix_of(shared_down, shared_down_offsets, p - PAIRS, SHARED_ALIGNED)
            acc = tl.zeros((BM, BN), tl.float32)
            found = from_inner(acc, shared_act + row * SHARED_I, valid, of_down, c, D, SHARED_I, BK)
            tl.store(shared_y + row * D + c[None, :], found, mask=valid[:, None] & (c < D)[None, :])
