"""Per-head latent attention, backward. Queries and keys have a kernel each: no program adds to another's output.

With P the softmax weights, recomputed from the lse, and delta = rowsum(grad_out * out):

    dS = P * (grad_out V^T - delta);  dQ = dS K;  dK = dS^T Q;  dV = P^T grad_out
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.mla.kernels.attention import VARYING, bounds_of, lse_of, rows_of, seen_by, seen_from
from openmythos_kernels.ops.mla.kernels.tiles import dot, load_tile, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_lse(lse, row, count):
    """+inf for queries that see nothing or do not exist, so that their weights are exp2(-inf) = 0."""
    x = tl.load(lse + row, mask=row < count, other=float("-inf"))
    return tl.where(x == float("-inf"), float("inf"), x)


@triton.jit
def _dq_over_keys(
    dqn,
    dqr,
    total,
    qn,
    qr,
    grad,
    log,
    delta,
    kv,
    kr,
    kv_stride,
    kr_stride,
    first,
    last,
    end,
    sees,
    scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HIDES: tl.constexpr,
):
    for n in range(first, last, BLOCK_N):
        k = load_tile(kv, n, kv_stride, end, BLOCK_N, NOPE, NOPE_BLOCK, HIDES)
        shared = load_tile(kr, n, kr_stride, end, BLOCK_N, ROPE, ROPE_BLOCK, HIDES)
        value = load_tile(kv + NOPE, n, kv_stride, end, BLOCK_N, V, V_BLOCK, HIDES)
        score = tl.dot(qn, tl.trans(k), input_precision="ieee")
        score = dot(qr, tl.trans(shared), score)
        weight = tl.exp2(score * scale - log[:, None])
        if HIDES:
            weight = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < sees[:, None], weight, 0.0)
        total += tl.sum(weight, 1)
        dweight = tl.dot(grad, tl.trans(value), input_precision="ieee")
        dscore = (weight * (dweight - delta[:, None])).to(k.dtype)
        dqn = dot(dscore, k, dqn)
        dqr = dot(dscore, shared, dqr)
    return dqn, dqr, total


@triton.jit(do_not_specialize=VARYING)
def attention_dq_kernel(
    q_nope,
    q_rope,
    kv,
    k_rope,
    places,
    limits,
    out,
    lse,
    grad_out,
    dq_nope,
    dq_rope,
    delta,
    T,
    S,
    qn_rows,
    qr_rows,
    kv_rows,
    kr_rows,
    qn_t,
    qn_h,
    qr_t,
    qr_h,
    kv_s,
    kv_h,
    kr_s,
    scale,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid and walk of `attention_kernel`. Also writes delta, laid out as the lse, for the kernel of the keys."""
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    m = (blocks - 1 - pid % blocks) * BLOCK_M
    h = tl.cast(pid // blocks % H, tl.int64)
    b = tl.cast(pid // blocks // H, tl.int64)

    first, count = rows_of(b, limits, T, PACKED)
    if PACKED:  # noqa: SIM102  (as in `attention_kernel`)
        if m >= count:
            return
    sees, end, whole = seen_by(m, b, first, count, places, limits, S, BLOCK_M, PACKED)
    whole = whole // BLOCK_N * BLOCK_N

    row = m + tl.arange(0, BLOCK_M)
    at = first * H * V + h * V
    grad = load_tile(grad_out + at, m, H * V, count, BLOCK_M, V, V_BLOCK, True)
    mean = load_tile(out + at, m, H * V, count, BLOCK_M, V, V_BLOCK, True)
    inner = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
    lse_first = lse_of(b, h, first, qn_rows, T, H, PACKED)
    tl.store(delta + lse_first + row, inner, mask=row < count)
    log = _load_lse(lse + lse_first, row, count)

    qn_first = first if PACKED else b * qn_rows
    qr_first = first if PACKED else b * qr_rows
    qn = load_tile(q_nope + qn_first * qn_t + h * qn_h, m, qn_t, count, BLOCK_M, NOPE, NOPE_BLOCK, True)
    qr = load_tile(q_rope + qr_first * qr_t + h * qr_h, m, qr_t, count, BLOCK_M, ROPE, ROPE_BLOCK, True)
    kv += b * kv_rows * kv_s + h * kv_h
    k_rope += b * kr_rows * kr_s

    dqn = tl.zeros((BLOCK_M, NOPE_BLOCK), tl.float32)
    dqr = tl.zeros((BLOCK_M, ROPE_BLOCK), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    dqn, dqr, total = _dq_over_keys(
        dqn,
        dqr,
        total,
        qn,
        qr,
        grad,
        log,
        inner,
        kv,
        k_rope,
        kv_s,
        kr_s,
        0,
        whole,
        end,
        sees,
        scale,
        NOPE,
        ROPE,
        V,
        NOPE_BLOCK,
        ROPE_BLOCK,
        V_BLOCK,
        BLOCK_N,
        False,
    )
    dqn, dqr, total = _dq_over_keys(
        dqn,
        dqr,
        total,
        qn,
        qr,
        grad,
        log,
        inner,
        kv,
        k_rope,
        kv_s,
        kr_s,
        whole,
        end,
        end,
        sees,
        scale,
        NOPE,
        ROPE,
        V,
        NOPE_BLOCK,
        ROPE_BLOCK,
        V_BLOCK,
        BLOCK_N,
        True,
    )
    natural = scale / LOG2E
    if dq_nope.dtype.element_ty == tl.float32:
        # A row's weights sum to one but for the rounding of the lse and of log2.
        unit = tl.where(total > 0.0, 1.0 / total, 1.0)[:, None]
        dqn, dqr = dqn * unit, dqr * unit
    first, count = rows_of(b, limits, T, PACKED)
    store_tile(dq_nope + (first * H + h) * NOPE, m, H * NOPE, count, dqn * natural, BLOCK_M, NOPE, NOPE_BLOCK)
    store_tile(dq_rope + (first * H + h) * ROPE, m, H * ROPE, count, dqr * natural, BLOCK_M, ROPE, ROPE_BLOCK)


@triton.jit
def _rows_before(n, places, count):
    """How many of the ascending places lie before n, by bisection."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        before = tl.load(places + middle) < n
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=VARYING)
def attention_dkv_kernel(
    q_nope,
    q_rope,
    kv,
    k_rope,
    places,
    limits,
    lse,
    grad_out,
    delta,
    dkv,
    parts,
    T,
    S,
    qn_rows,
    qr_rows,
    kv_rows,
    kr_rows,
    qn_t,
    qn_h,
    qr_t,
    qr_h,
    kv_s,
    kv_h,
    kr_s,
    scale,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid: (B * ceil(S / BLOCK_N), H). The first keys of a row come first, as most queries see them.

    A program owns a block of keys of one head. It writes its part of the shared rotary key's gradient to parts[h]
    (H, B, S, ROPE) float32: a loop over heads would sum them in registers, and tiles of wide heads then spill. Keys
    past a row's end get zeros.
    """
    blocks = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    h = tl.cast(tl.program_id(1), tl.int64)
    n = pid % blocks * BLOCK_N
    b = tl.cast(pid // blocks, tl.int64)
    first, count = rows_of(b, limits, T, PACKED)
    if PACKED:
        places += first
        end = seen_from(tl.load(places + count - 1, mask=count > 0, other=-1), S)
        before = _rows_before(n, places, count)
    else:
        begin, end = bounds_of(b, places, limits, count, S)
        before = tl.maximum(n - begin, 0)
    valid = (n + tl.arange(0, BLOCK_N) < end)[:, None]

    stop = tl.where(n < end, count, 0)  # past the row's end there are only zeros to write
    begins = tl.minimum(before // BLOCK_M * BLOCK_M, stop)

    kv += b * kv_rows * kv_s + h * kv_h
    k = load_tile(kv, n, kv_s, end, BLOCK_N, NOPE, NOPE_BLOCK, True)
    value = load_tile(kv + NOPE, n, kv_s, end, BLOCK_N, V, V_BLOCK, True)
    shared = load_tile(k_rope + b * kr_rows * kr_s, n, kr_s, end, BLOCK_N, ROPE, ROPE_BLOCK, True)
    qn_first = first if PACKED else b * qn_rows
    qr_first = first if PACKED else b * qr_rows
    q_nope += qn_first * qn_t + h * qn_h
    q_rope += qr_first * qr_t + h * qr_h
    grad_out += (first * H + h) * V
    lse_first = lse_of(b, h, first, qn_rows, T, H, PACKED)
    lse += lse_first
    delta += lse_first

    # Scores are (keys, queries) here, the layout in which the products read them.
    dkn = tl.zeros((BLOCK_N, NOPE_BLOCK), tl.float32)
    dkr = tl.zeros((BLOCK_N, ROPE_BLOCK), tl.float32)
    dv = tl.zeros((BLOCK_N, V_BLOCK), tl.float32)
    for m in range(begins, stop, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        qn = load_tile(q_nope, m, qn_t, count, BLOCK_M, NOPE, NOPE_BLOCK, True)
        qr = load_tile(q_rope, m, qr_t, count, BLOCK_M, ROPE, ROPE_BLOCK, True)
        grad = load_tile(grad_out, m, H * V, count, BLOCK_M, V, V_BLOCK, True)
        score = tl.dot(k, tl.trans(qn), input_precision="ieee")
        score = dot(shared, tl.trans(qr), score)
        # Before the weights, so that tensor cores overlap with the exponentials.
        dweight = tl.dot(value, tl.trans(grad), input_precision="ieee")
        weight = tl.exp2(score * scale - _load_lse(lse, row, count)[None, :])
        at = tl.load(places + row, mask=row < count, other=-1).to(tl.int32) if PACKED else begin + row
        weight = tl.where((n + tl.arange(0, BLOCK_N))[:, None] <= at[None, :], weight, 0.0)
        dv = dot(weight.to(grad.dtype), grad, dv)
        inner = tl.load(delta + row, mask=row < count, other=0.0)
        dscore = (weight * (dweight - inner[None, :])).to(qn.dtype)
        dkn = dot(dscore, qn, dkn)
        dkr = dot(dscore, qr, dkr)

    natural = scale / LOG2E
    dkv += (b * S * H + h) * (NOPE + V)
    store_tile(dkv, n, H * (NOPE + V), S, tl.where(valid, dkn * natural, 0.0), BLOCK_N, NOPE, NOPE_BLOCK)
    store_tile(dkv + NOPE, n, H * (NOPE + V), S, tl.where(valid, dv, 0.0), BLOCK_N, V, V_BLOCK)
    batch = tl.cast(tl.num_programs(0) // blocks, tl.int64)
    parts += (h * batch + b) * S * ROPE
    store_tile(parts, n, ROPE, S, tl.where(valid, dkr * natural, 0.0), BLOCK_N, ROPE, ROPE_BLOCK)


@triton.jit(do_not_specialize=["size", "groups"])
def sum_groups_kernel(parts, out, size, groups, BLOCK: tl.constexpr):
    """out[i] = sum over g of parts[g, i], in order. Grid: ceil(size / BLOCK)."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for g in range(0, groups):
        total += tl.load(parts + g * tl.cast(size, tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)
