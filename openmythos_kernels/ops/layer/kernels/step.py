"""What lies between a block and the next one: the sum of a token's experts, and the loop step. A program has a whole
row, whose sums it takes in registers."""

import triton
import triton.language as tl

from openmythos_kernels.ops.layer.kernels.overlap import overlap
from openmythos_kernels.ops.loop.kernels.step import _columns, _decay, _halt


@triton.jit
def summed(x, y, topk_weights, shared_y, n, N, c, inside, K: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr):
    """x + the experts of token n in channels c, float32: those of its choice, weighted, and then the shared ones, each
    in order."""
    acc = tl.zeros(c.shape, tl.float32)
    for k in tl.static_range(K):
        pair = n * K + k
        acc += tl.load(topk_weights + pair).to(tl.float32) * _columns(y + pair * D, c, inside)
    for s in tl.static_range(SHARED):
        acc += _columns(shared_y + (s * tl.cast(N, tl.int64) + n) * D, c, inside)
    return _columns(x + n * D, c, inside) + acc


@triton.jit(do_not_specialize=["N"])
def sum_kernel(
    x,
    y,
    topk_weights,
    shared_y,
    out,
    N,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`summed` of all tokens. Grid: (N, ceil(D / BLOCK))."""
    overlap(OVERLAP)
    n = tl.cast(tl.program_id(0), tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    found = summed(x, y, topk_weights, shared_y, n, N, c, inside, K, SHARED, D)
    tl.store(out + n * D + c, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _entered(state, injected, emb, embedded, norm_weight, eps, c, inside, D: tl.constexpr):
    """RMSNorm(h + the loop's embedding + e) of a row in float32."""
    entering = state + injected + _columns(emb, c, c < embedded)
    return entering / tl.sqrt(tl.sum(entering * entering, 0) / D + eps) * _columns(norm_weight, c, inside)


@triton.jit
def enter_kernel(h, e, emb, norm_weight, u, embedded, eps, D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """What the first loop's block reads. Grid: (N,)."""
    overlap(OVERLAP)
    n = tl.cast(tl.program_id(0), tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < D
    state, injected = _columns(h + n * D, c, inside), _columns(e + n * D, c, inside)
    found = _entered(state, injected, emb, embedded, norm_weight, eps, c, inside, D)
    tl.store(u + n * D + c, found.to(u.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "loop", "depth"])
def step_kernel(
    h,
    e,
    u,
    x,
    y,
    topk_weights,
    shared_y,
    h_out,
    cumulative_p,
    running,
    ponder,
    lora_down,
    lora_scale,
    lora_B,
    log_A,
    log_dt,
    B,
    halt_weight,
    halt_bias,
    norm_weight,
    emb,
    h_next,
    h_out_next,
    cumulative_p_next,
    running_next,
    ponder_next,
    u_next,
    N,
    loop,
    depth,
    embedded,
    threshold,
    eps,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ACT: tl.constexpr,
    SPEND_REMAINDER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All that follows loop `loop`'s blocks: the sum of the last block's experts, LoRA, injection, halting, and what
    the next loop's block reads (not in the LAST). Grid: (N,).

    u: what this loop's first block read; only read where RESIDUAL. x, y, topk_weights, shared_y: as of `summed`; with a
    dense FFN x is the block's output. depth: the row of lora_scale. FIRST: nothing is summed yet and all positions run;
    the state of halting is not read. Without ACT it is not written either.
    """
    overlap(OVERLAP)
    n = tl.cast(tl.program_id(0), tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < D
    at = n * D + c
    injected = _columns(e + n * D, c, inside)
    f = summed(x, y, topk_weights, shared_y, n, N, c, inside, K, SHARED, D)
    A, _ = _decay(log_A, log_dt, c, inside)
    state = A * _columns(h + n * D, c, inside) + _columns(B, c, inside) * injected + f
    if RESIDUAL:
        state -= _columns(u + n * D, c, inside)
    for k in tl.static_range(RANK):
        scale = tl.load(lora_scale + depth * RANK + k).to(tl.float32)
        coordinate = tl.sum(f * _columns(lora_down + k * D, c, inside), 0) * scale
        state += coordinate * _columns(lora_B + k * D, c, inside)
    stored = state.to(h_next.dtype.element_ty)
    tl.store(h_next + at, stored, mask=inside)
    state = tl.where(inside, stored.to(tl.float32), 0.0)

    if ACT:
        logit = tl.sum(state * _columns(halt_weight, c, inside), 0) + tl.load(halt_bias).to(tl.float32)
        p = 1.0 / (1.0 + tl.exp(-logit))
        if FIRST:
            spent, cost = tl.zeros_like(p), tl.zeros_like(p)
            runs = spent == 0.0
            sum_so_far = tl.zeros((BLOCK,), tl.float32)
        else:
            spent, cost = tl.load(cumulative_p + n), tl.load(ponder + n)
            runs = tl.load(running + n) != 0
            sum_so_far = _columns(h_out + n * D, c, inside)
        weight, _ = _halt(p, spent, runs, threshold, SPEND_REMAINDER)
        total = spent + p
        tl.store(cumulative_p_next + n, tl.where(runs, total, spent))
        tl.store(ponder_next + n, tl.where(runs, (loop + 1).to(tl.float32) + (1.0 - spent), cost))
        tl.store(running_next + n, (runs & (total < threshold)).to(tl.int8))
        sum_so_far += weight * state
        tl.store(h_out_next + at, sum_so_far.to(h_out_next.dtype.element_ty), mask=inside)
    if not LAST:
        found = _entered(state, injected, emb, embedded, norm_weight, eps, c, inside, D)
        tl.store(u_next + at, found.to(u_next.dtype.element_ty), mask=inside)
