"""The loop step with all loads of a row issued before what depends on them; selected by OPENMYTHOS_UNPROVEN=1.

A store keeps the compiler from moving later loads above it, since the two might overlap; so the loads stand first. The
formulas are those of `step.py`. Whichever of the two a GPU finds slower goes.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.loop.kernels.step import _columns, _decay, _halt, _row_scalars

# The embedding's length is a multiple of so many elements, which Triton compiles in: then its mask splits no load.
EMBEDDED_MULTIPLE = 16


@triton.jit(do_not_specialize=["N", "loop"])
def loop_step_early_kernel(
    h,
    e,
    f,
    lora_hidden,
    h_out,
    cumulative_p,
    running,
    ponder,
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
    u,
    p_out,
    rstd_out,
    N,
    D,
    embedded,
    loop,
    threshold,
    eps,
    RANK: tl.constexpr,
    SPEND_REMAINDER: tl.constexpr,
    ENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(N / ROWS),), like `loop_step_kernel`, whose AGAIN this has no use for: rows are kept."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    here, inside = rows < N, cols < D
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    both = here[:, None] & inside[None, :]

    seen_e = tl.load(e + at, mask=both, other=0.0)
    seen_h = tl.load(h + at, mask=both, other=0.0)
    seen_f = tl.load(f + at, mask=both, other=0.0)
    seen_out = tl.load(h_out + at, mask=both, other=0.0)
    before = tl.load(cumulative_p + rows, mask=here, other=0.0)
    cost = tl.load(ponder + rows, mask=here, other=0.0)
    runs = tl.load(running + rows, mask=here, other=0) != 0
    bias = tl.load(halt_bias).to(tl.float32)
    on_B, on_halt = _columns(B, cols, inside), _columns(halt_weight, cols, inside)
    if ENTER:
        phase = _columns(emb, cols, cols < embedded)
        gain = _columns(norm_weight, cols, inside)

    injected = seen_e.to(tl.float32)
    A, _ = _decay(log_A, log_dt, cols, inside)
    state = A[None, :] * seen_h.to(tl.float32)
    state += on_B[None, :] * injected
    state += seen_f.to(tl.float32)
    for k in tl.static_range(RANK):
        coordinate = tl.load(lora_hidden + rows.to(tl.int64) * RANK + k, mask=here, other=0.0).to(tl.float32)
        state += coordinate[:, None] * _columns(lora_B + k * D, cols, inside)[None, :]
    stored = state.to(h_next.dtype.element_ty)
    tl.store(h_next + at, stored, mask=both)
    state = tl.where(both, stored.to(tl.float32), 0.0)

    logit = tl.sum(state * on_halt[None, :], axis=1)
    p = 1.0 / (1.0 + tl.exp(-(logit + bias)))
    weight, _ = _halt(p, before, runs, threshold, SPEND_REMAINDER)
    total = before + p
    tl.store(p_out + rows, p, mask=here)
    tl.store(cumulative_p_next + rows, tl.where(runs, total, before), mask=here)
    tl.store(ponder_next + rows, tl.where(runs, (loop + 1).to(tl.float32) + (1.0 - before), cost), mask=here)
    tl.store(running_next + rows, (runs & (total < threshold)).to(tl.int8), mask=here)
    sum_so_far = seen_out.to(tl.float32) + weight[:, None] * state
    tl.store(h_out_next + at, sum_so_far.to(h_out_next.dtype.element_ty), mask=both)

    if ENTER:
        entering = state + injected + phase[None, :]
        rstd = 1.0 / tl.sqrt(tl.sum(entering * entering, axis=1) / D + eps)
        tl.store(rstd_out + rows, rstd, mask=here)
        normed = entering * rstd[:, None] * gain[None, :]
        tl.store(u + at, normed.to(u.dtype.element_ty), mask=both)


@triton.jit
def _row_tiles(
    grad_h, grad_h_out, grad_u, h, e, h_next, at, both, ENTER: tl.constexpr, HAS_H: tl.constexpr, HAS_OUT: tl.constexpr
):
    """The six tiles of a program's rows, in their own dtype; zeros for a missing gradient."""
    state = tl.load(h_next + at, mask=both, other=0.0)
    injected = tl.load(e + at, mask=both, other=0.0)
    entered = tl.load(h + at, mask=both, other=0.0)
    g = tl.load(grad_h + at, mask=both, other=0.0) if HAS_H else tl.zeros_like(state)
    out = tl.load(grad_h_out + at, mask=both, other=0.0) if HAS_OUT else tl.zeros_like(state)
    grad = tl.load(grad_u + at, mask=both, other=0.0) if ENTER else tl.zeros_like(state)
    return state, injected, entered, g, out, grad


@triton.jit(do_not_specialize=["N", "rows_each"])
def loop_step_backward_early_kernel(
    grad_h,
    grad_h_out,
    grad_cumulative_p,
    grad_ponder,
    grad_u,
    h,
    e,
    cumulative_p,
    running,
    h_next,
    p,
    rstd,
    log_A,
    log_dt,
    B,
    halt_weight,
    norm_weight,
    emb,
    dh,
    de,
    df,
    dcumulative_p,
    dponder,
    sums,
    bias,
    N,
    D,
    embedded,
    rows_each,
    threshold,
    SPEND_REMAINDER: tl.constexpr,
    ENTER: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_SPENT: tl.constexpr,
    HAS_PONDER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (row blocks,), like `loop_step_backward_kernel` where a tile spans a row (WHOLE). The next rows' tiles are
    loaded before this round's reductions and stores."""
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    on_A = tl.zeros((BLOCK,), tl.float32)
    on_B = tl.zeros((BLOCK,), tl.float32)
    on_halt = tl.zeros((BLOCK,), tl.float32)
    on_gain = tl.zeros((BLOCK,), tl.float32)
    on_bias = tl.zeros((ROWS,), tl.float32)
    A, _ = _decay(log_A, log_dt, cols, inside)
    phase = cols < embedded
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    rows = first + tl.arange(0, ROWS)
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    both = (rows < last)[:, None] & inside[None, :]
    state_, injected_, entered_, g_, out_, grad_ = _row_tiles(
        grad_h, grad_h_out, grad_u, h, e, h_next, at, both, ENTER, HAS_H, HAS_OUT
    )
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        here = rows < last
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        both = here[:, None] & inside[None, :]
        state, injected, entered = state_.to(tl.float32), injected_.to(tl.float32), entered_.to(tl.float32)
        g, out, grad = g_.to(tl.float32), out_.to(tl.float32), grad_.to(tl.float32)
        later = rows + ROWS
        state_, injected_, entered_, g_, out_, grad_ = _row_tiles(
            grad_h,
            grad_h_out,
            grad_u,
            h,
            e,
            h_next,
            later.to(tl.int64)[:, None] * D + cols[None, :],
            (later < last)[:, None] & inside[None, :],
            ENTER,
            HAS_H,
            HAS_OUT,
        )
        dot_weight = tl.sum(out * state, axis=1)
        dot_norm = tl.zeros_like(dot_weight)
        if ENTER:
            entering = tl.where(both, state + injected + _columns(emb, cols, phase)[None, :], 0.0)
            gained = grad * _columns(norm_weight, cols, inside)[None, :]
            dot_norm = tl.sum(gained * entering, axis=1)
        weight, logit, scale, shrink, to_spent, to_ponder = _row_scalars(
            dot_weight,
            dot_norm,
            rows,
            here,
            cumulative_p,
            running,
            p,
            rstd,
            grad_cumulative_p,
            grad_ponder,
            threshold,
            D,
            SPEND_REMAINDER,
            ENTER,
            HAS_SPENT,
            HAS_PONDER,
        )
        tl.store(dcumulative_p + rows, to_spent, mask=here)
        tl.store(dponder + rows, to_ponder, mask=here)
        on_bias += logit
        g += weight[:, None] * out + logit[:, None] * _columns(halt_weight, cols, inside)[None, :]
        into_e = _columns(B, cols, inside)[None, :]
        if ENTER:
            through = gained * scale[:, None] + shrink[:, None] * entering
            g += through
            tl.store(de + at, (into_e * g + through).to(de.dtype.element_ty), mask=both)
            on_gain += tl.sum(grad * scale[:, None] * entering, axis=0)
        else:
            tl.store(de + at, (into_e * g).to(de.dtype.element_ty), mask=both)
        tl.store(df + at, g.to(df.dtype.element_ty), mask=both)
        tl.store(dh + at, (A[None, :] * g).to(dh.dtype.element_ty), mask=both)
        on_A += tl.sum(g * entered, axis=0)
        on_B += tl.sum(g * injected, axis=0)
        on_halt += tl.sum(logit[:, None] * state, axis=0)
    mine = sums + tl.program_id(0).to(tl.int64) * 4 * D + cols
    tl.store(mine, on_A, mask=inside)
    tl.store(mine + D, on_B, mask=inside)
    tl.store(mine + 2 * D, on_halt, mask=inside)
    tl.store(mine + 3 * D, on_gain, mask=inside)
    tl.store(bias + tl.program_id(0), tl.sum(on_bias, axis=0))
