"""Routing, forward and backward: top-K of logits + bias, softmax over the chosen logits, tokens per expert."""

import triton
import triton.language as tl


@triton.jit
def ordered(s):
    """float32 -> int32 in the same order, with NaN above everything and -0 equal to 0."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(s == s, bits, 0x7FFFFFFF)


@triton.jit(do_not_specialize=["N"])
def route_kernel(
    logits,
    bias,
    topk_weights,
    expert_idx,
    load,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Grid: (ceil(N / ROWS),). A program routes ROWS tokens and holds their logits in registers.

    An integer has the order of a sum in its upper half and the expert, counted down, in its lower half: the maximum is
    the largest sum and, among equal ones, the lowest expert. `load` starts at zero; sums of integers do not depend on
    their order. ROUNDED: logits + bias is rounded to the logits' dtype, as PyTorch does when both have that dtype.
    """
    LOWEST: tl.constexpr = -(2**63)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E_BLOCK)
    k = tl.arange(0, K_BLOCK)
    here = (n < N)[:, None] & (e < E)[None, :]
    logit = tl.load(logits + n[:, None] * E + e[None, :], mask=here, other=0.0).to(tl.float32)
    s = logit + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if ROUNDED:
        s = s.to(logits.dtype.element_ty).to(tl.float32)
    packed = (ordered(s).to(tl.int64) << 32) | (E_BLOCK - 1 - e)[None, :].to(tl.int64)
    packed = tl.where((e < E)[None, :], packed, LOWEST)

    idx = tl.zeros((ROWS, K_BLOCK), tl.int32)
    chosen = tl.full((ROWS, K_BLOCK), float("-inf"), tl.float32)
    picked = tl.zeros((ROWS, E_BLOCK), tl.int32)
    for j in range(K):
        best = E_BLOCK - 1 - (tl.max(packed, 1) & 0x7FFFFFFF).to(tl.int32)
        hit = e[None, :] == best[:, None]
        value = tl.sum(tl.where(hit, logit, 0.0), 1)
        idx = tl.where((k == j)[None, :], best[:, None], idx)
        chosen = tl.where((k == j)[None, :], value[:, None], chosen)
        picked = tl.where(hit, 1, picked)
        packed = tl.where(hit, LOWEST, packed)

    # A row of nothing but -inf gives exp(-inf + inf) = NaN, as PyTorch's softmax does.
    weight = tl.where((k < K)[None, :], tl.exp(chosen - tl.max(chosen, 1)[:, None]), 0.0)
    weight = weight / tl.sum(weight, 1)[:, None]
    there = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    tl.store(topk_weights + at, weight.to(topk_weights.dtype.element_ty), mask=there)
    tl.store(expert_idx + at, idx.to(tl.int64), mask=there)
    count = tl.sum(tl.where(here, picked, 0), 0)
    tl.atomic_add(load + e, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["N"])
def route_backward_kernel(
    dtopk_weights,
    topk_weights,
    expert_idx,
    dlogits,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Grid: (ceil(N / ROWS),). A program writes all E gradients of ROWS tokens: w * (dw - sum(w * dw)) at the chosen
    experts, zero at the others."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E_BLOCK)
    k = tl.arange(0, K_BLOCK)
    there = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    g = tl.load(topk_weights + at, mask=there, other=0.0).to(tl.float32)
    dg = tl.load(dtopk_weights + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(g * dg, 1)
    out = tl.zeros((ROWS, E_BLOCK), tl.float32)
    for j in range(K):
        idx = tl.load(expert_idx + n * K + j, mask=n < N, other=0).to(tl.int32)
        gj = tl.load(topk_weights + n * K + j, mask=n < N, other=0.0).to(tl.float32)
        dgj = tl.load(dtopk_weights + n * K + j, mask=n < N, other=0.0).to(tl.float32)
        out = tl.where(e[None, :] == idx[:, None], (gj * (dgj - mean))[:, None], out)
    tl.store(
        dlogits + n[:, None] * E + e[None, :],
        out.to(dlogits.dtype.element_ty),
        mask=(n < N)[:, None] & (e < E)[None, :],
    )
