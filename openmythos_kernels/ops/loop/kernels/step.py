"""The loop step on a GPU; `step.py` says what each tensor is. Sums are float32, column sums in a fixed order."""

import triton
import triton.language as tl

LOG_RATE_MIN = tl.constexpr(-16.6)
LOG_RATE_MAX = tl.constexpr(20.0)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def _columns(x, at, inside):
    """Per-channel parameters as float32."""
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _decay(log_A, log_dt, at, inside):
    """A and dA/d(log rate) per channel. A GPU's exp errs by two ulp, so A = 1 is excluded by hand."""
    log_rate = tl.load(log_dt).to(tl.float32) + _columns(log_A, at, inside)
    held = tl.where(log_rate < LOG_RATE_MIN, LOG_RATE_MIN, tl.where(log_rate > LOG_RATE_MAX, LOG_RATE_MAX, log_rate))
    rate = tl.exp(held)
    value = tl.exp(-rate)
    value = tl.where(value > BELOW_ONE, BELOW_ONE, value)
    slope = tl.where((log_rate >= LOG_RATE_MIN) & (log_rate <= LOG_RATE_MAX), -value * rate, 0.0)
    return value, slope


@triton.jit
def _halt(p, cumulative_p, running, threshold, SPEND_REMAINDER: tl.constexpr):
    """ACT's weight of the new state, and whether the position spends its remainder."""
    remainder = cumulative_p + p >= threshold
    if SPEND_REMAINDER:
        remainder = remainder | (p == p)
    left = 1.0 - cumulative_p
    weight = tl.where(remainder, tl.where(left < 0.0, 0.0, left), p)
    return tl.where(running, weight, 0.0), remainder


@triton.jit(do_not_specialize=["N", "embedded", "loop"])
def loop_step_kernel(
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
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(N / ROWS),). A program holds ROWS whole rows (BLOCK >= D) and moves each row seven times: it
    reads h, e, f, h_out and writes h', h_out', u. AGAIN: e is read a second time instead of being held."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    here, inside = rows < N, cols < D
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    both = here[:, None] & inside[None, :]

    injected = tl.load(e + at, mask=both, other=0.0).to(tl.float32)
    A, _ = _decay(log_A, log_dt, cols, inside)
    state = A[None, :] * tl.load(h + at, mask=both, other=0.0).to(tl.float32)
    state += _columns(B, cols, inside)[None, :] * injected
    state += tl.load(f + at, mask=both, other=0.0).to(tl.float32)
    for k in range(RANK):
        coordinate = tl.load(lora_hidden + rows.to(tl.int64) * RANK + k, mask=here, other=0.0).to(tl.float32)
        state += coordinate[:, None] * _columns(lora_B + k * D, cols, inside)[None, :]
    stored = state.to(h_next.dtype.element_ty)
    tl.store(h_next + at, stored, mask=both)
    state = tl.where(both, stored.to(tl.float32), 0.0)

    logit = tl.sum(state * _columns(halt_weight, cols, inside)[None, :], axis=1)
    p = 1.0 / (1.0 + tl.exp(-(logit + tl.load(halt_bias).to(tl.float32))))
    before = tl.load(cumulative_p + rows, mask=here, other=0.0)
    cost = tl.load(ponder + rows, mask=here, other=0.0)
    runs = tl.load(running + rows, mask=here, other=0) != 0
    weight, _ = _halt(p, before, runs, threshold, SPEND_REMAINDER)
    total = before + p
    tl.store(p_out + rows, p, mask=here)
    tl.store(cumulative_p_next + rows, tl.where(runs, total, before), mask=here)
    tl.store(ponder_next + rows, tl.where(runs, (loop + 1).to(tl.float32) + (1.0 - before), cost), mask=here)
    tl.store(running_next + rows, (runs & (total < threshold)).to(tl.int8), mask=here)
    sum_so_far = tl.load(h_out + at, mask=both, other=0.0).to(tl.float32) + weight[:, None] * state
    tl.store(h_out_next + at, sum_so_far.to(h_out_next.dtype.element_ty), mask=both)

    if ENTER:
        if AGAIN:
            injected = tl.load(e + at, mask=both, other=0.0).to(tl.float32)
        entering = state + injected + _columns(emb, cols, cols < embedded)[None, :]
        rstd = 1.0 / tl.sqrt(tl.sum(entering * entering, axis=1) / D + eps)
        tl.store(rstd_out + rows, rstd, mask=here)
        normed = entering * rstd[:, None] * _columns(norm_weight, cols, inside)[None, :]
        tl.store(u + at, normed.to(u.dtype.element_ty), mask=both)


@triton.jit
def _row_scalars(
    on_weight,
    on_norm,
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
    SPEND_REMAINDER: tl.constexpr,
    ENTER: tl.constexpr,
    HAS_SPENT: tl.constexpr,
    HAS_PONDER: tl.constexpr,
):
    """What a row's two dot products give: weight, gradient of the logit, the norm's scale and shrink, dcumulative_p,
    dponder."""
    before = tl.load(cumulative_p + rows, mask=here, other=0.0)
    runs = tl.load(running + rows, mask=here, other=0) != 0
    prob = tl.load(p + rows, mask=here, other=0.0)
    weight, remainder = _halt(prob, before, runs, threshold, SPEND_REMAINDER)
    gs = tl.load(grad_cumulative_p + rows, mask=here, other=0.0) if HAS_SPENT else tl.zeros_like(on_weight)
    gp = tl.load(grad_ponder + rows, mask=here, other=0.0) if HAS_PONDER else tl.zeros_like(on_weight)
    on_left = tl.where(remainder & (1.0 - before >= 0.0), on_weight, 0.0) + gp
    on_p = tl.where(runs, gs + tl.where(remainder, 0.0, on_weight), 0.0)
    dcumulative_p = tl.where(runs, gs - on_left, gs)
    dponder = tl.where(runs, 0.0, gp)
    logit = on_p * prob * (1.0 - prob)
    if ENTER:
        scale = tl.load(rstd + rows, mask=here, other=0.0)
        shrink = -on_norm / D * scale * scale * scale
    else:
        scale = tl.zeros_like(on_weight)
        shrink = tl.zeros_like(on_weight)
    return weight, logit, scale, shrink, dcumulative_p, dponder


@triton.jit(do_not_specialize=["N", "embedded"])
def loop_dots_kernel(
    grad_h_out,
    grad_u,
    e,
    h_next,
    norm_weight,
    emb,
    on_weight,
    on_norm,
    N,
    D,
    embedded,
    ENTER: tl.constexpr,
    HAS_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(N / ROWS),). The two dot products of each row, for rows too wide for
    `loop_step_backward_kernel` to hold whole."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < N
    weights = tl.zeros((ROWS, BLOCK), tl.float32)
    norms = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, D, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < D
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        both = here[:, None] & inside[None, :]
        state = tl.load(h_next + at, mask=both, other=0.0).to(tl.float32)
        if HAS_OUT:
            weights += state * tl.load(grad_h_out + at, mask=both, other=0.0).to(tl.float32)
        if ENTER:
            entering = state + tl.load(e + at, mask=both, other=0.0).to(tl.float32)
            entering += _columns(emb, cols, cols < embedded)[None, :]
            grad = tl.load(grad_u + at, mask=both, other=0.0).to(tl.float32)
            norms += entering * grad * _columns(norm_weight, cols, inside)[None, :]
    tl.store(on_weight + rows, tl.sum(weights, axis=1), mask=here)
    tl.store(on_norm + rows, tl.sum(norms, axis=1), mask=here)


@triton.jit(do_not_specialize=["N", "embedded", "rows_each"])
def loop_step_backward_kernel(
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
    on_weight,
    on_norm,
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
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (row blocks, ceil(D / BLOCK)). A program walks its block's rows, ROWS at a time. It writes the gradients of
    its columns, their four column sums to sums (row blocks, 4, D), and the sum of its logits' gradients to bias.

    WHOLE: a tile spans a row, and the dot products are computed here; else `loop_dots_kernel` has computed them.
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    on_A = tl.zeros((BLOCK,), tl.float32)
    on_B = tl.zeros((BLOCK,), tl.float32)
    on_halt = tl.zeros((BLOCK,), tl.float32)
    on_gain = tl.zeros((BLOCK,), tl.float32)
    on_bias = tl.zeros((ROWS,), tl.float32)
    A, _ = _decay(log_A, log_dt, cols, inside)
    first = tl.program_id(0) * rows_each
    last = tl.minimum(first + rows_each, N)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        here = rows < last
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        both = here[:, None] & inside[None, :]
        state = tl.load(h_next + at, mask=both, other=0.0).to(tl.float32)
        injected = tl.load(e + at, mask=both, other=0.0).to(tl.float32)
        g = tl.load(grad_h + at, mask=both, other=0.0).to(tl.float32) if HAS_H else tl.zeros_like(state)
        out = tl.load(grad_h_out + at, mask=both, other=0.0).to(tl.float32) if HAS_OUT else tl.zeros_like(state)
        if ENTER:
            grad = tl.load(grad_u + at, mask=both, other=0.0).to(tl.float32)
            entering = state + injected + _columns(emb, cols, cols < embedded)[None, :]
            entering = tl.where(both, entering, 0.0)
            gained = grad * _columns(norm_weight, cols, inside)[None, :]
        if WHOLE:
            dot_weight = tl.sum(out * state, axis=1)
            dot_norm = tl.sum(gained * entering, axis=1) if ENTER else tl.zeros_like(dot_weight)
        else:
            dot_weight = tl.load(on_weight + rows, mask=here, other=0.0)
            dot_norm = tl.load(on_norm + rows, mask=here, other=0.0)
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
        if tl.program_id(1) == 0:
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
        on_A += tl.sum(g * tl.load(h + at, mask=both, other=0.0).to(tl.float32), axis=0)
        on_B += tl.sum(g * injected, axis=0)
        on_halt += tl.sum(logit[:, None] * state, axis=0)
    mine = sums + tl.program_id(0).to(tl.int64) * 4 * D + cols
    tl.store(mine, on_A, mask=inside)
    tl.store(mine + D, on_B, mask=inside)
    tl.store(mine + 2 * D, on_halt, mask=inside)
    tl.store(mine + 3 * D, on_gain, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(bias + tl.program_id(0), tl.sum(on_bias, axis=0))


@triton.jit(do_not_specialize=["blocks"])
def loop_sums_kernel(
    sums, log_A, log_dt, dlog_A, dB, dhalt_weight, dnorm_weight, rates, blocks, D, BLOCK: tl.constexpr
):
    """Grid (ceil(D / BLOCK),). Adds the row blocks' column sums in order; `rates` receives the gradients of the log
    rates."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    on_A = tl.zeros((BLOCK,), tl.float32)
    on_B = tl.zeros((BLOCK,), tl.float32)
    on_halt = tl.zeros((BLOCK,), tl.float32)
    on_gain = tl.zeros((BLOCK,), tl.float32)
    for b in range(blocks):
        mine = sums + (b + tl.zeros((1,), tl.int64)) * 4 * D + cols
        on_A += tl.load(mine, mask=inside, other=0.0)
        on_B += tl.load(mine + D, mask=inside, other=0.0)
        on_halt += tl.load(mine + 2 * D, mask=inside, other=0.0)
        on_gain += tl.load(mine + 3 * D, mask=inside, other=0.0)
    _, slope = _decay(log_A, log_dt, cols, inside)
    rate = on_A * slope
    tl.store(rates + cols, rate, mask=inside)
    tl.store(dlog_A + cols, rate.to(dlog_A.dtype.element_ty), mask=inside)
    tl.store(dB + cols, on_B.to(dB.dtype.element_ty), mask=inside)
    tl.store(dhalt_weight + cols, on_halt.to(dhalt_weight.dtype.element_ty), mask=inside)
    tl.store(dnorm_weight + cols, on_gain.to(dnorm_weight.dtype.element_ty), mask=inside)
