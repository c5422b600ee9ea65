"""Per-head latent attention, forward: one program per (query block, head, sequence).

Queries have one of two forms. Consecutive: q is (B, T, H, width), and query i of sequence b sees the keys up to
start[b] + i, below key_lengths[b]. PACKED: q is (N, H, width), rows offset[b] .. offset[b + 1] are of sequence b, and
row n sees the keys up to position[n], which ascends within a sequence. The kernels get (start, key_lengths) or
(position, offset) as `places` and `limits`. T is the most queries of a sequence. Packed rows are one batch, and so its
stride in rows is N.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.mla.kernels.tiles import dot, load_tile, store_tile

VARYING = ["T", "S", "qn_rows", "qr_rows", "kv_rows", "kr_rows"]


@triton.jit
def rows_of(b, limits, T, PACKED: tl.constexpr):
    """The first row of sequence b in tensors of queries, and the number of its rows.

    The loads are volatile so that a kernel can ask again behind its loop instead of keeping the answer in registers.
    """
    if PACKED:
        first = tl.load(limits + b, volatile=True)
        count = (tl.load(limits + b + 1, volatile=True) - first).to(tl.int32)
    else:
        first = b * T
        count = T
    return first, count


@triton.jit
def lse_of(b, h, first, rows, T, H: tl.constexpr, PACKED: tl.constexpr):
    """Where the lse of head h and sequence b begins. Computed where it is used: registers are scarce."""
    return h * rows + first if PACKED else (b * H + h) * T


@triton.jit
def bounds_of(b, places, limits, T, S):
    """start and key_lengths of sequence b in 32 bits: clamped to where the result is the same for all T queries and S
    keys, whatever the caller gave, so that no cast wraps and nothing outside the keys is read."""
    begin = tl.maximum(tl.minimum(tl.load(places + b), S), -T).to(tl.int32)
    held = tl.maximum(tl.minimum(tl.load(limits + b), S), 0).to(tl.int32)
    return begin, held


@triton.jit
def seen_from(position, S):
    """The keys that a packed row at this position sees, in 32 bits."""
    return tl.maximum(tl.minimum(position + 1, S), 0).to(tl.int32)


@triton.jit
def seen_by(m, b, first, count, places, limits, S, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Of the queries m .. m + BLOCK_M of sequence b: how many keys each sees, any sees, and all see."""
    row = m + tl.arange(0, BLOCK_M)
    if PACKED:
        sees = tl.minimum(tl.load(places + first + row, mask=row < count, other=-1) + 1, S).to(tl.int32)
        any_sees = seen_from(tl.load(places + first + tl.minimum(m + BLOCK_M, count) - 1), S)
        all_see = seen_from(tl.load(places + first + m), S)
    else:
        begin, held = bounds_of(b, places, limits, count, S)
        sees = tl.minimum(begin + row + 1, held)
        any_sees = tl.minimum(begin + tl.minimum(m + BLOCK_M, count), held)
        all_see = tl.minimum(begin + m + 1, held)
    return sees, any_sees, all_see


@triton.jit
def _over_keys(
    acc,
    top,
    total,
    qn,
    qr,
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
    """Online softmax over the keys [first, last). HIDES: query i sees only the keys below sees[i]."""
    for n in range(first, last, BLOCK_N):
        k = load_tile(kv, n, kv_stride, end, BLOCK_N, NOPE, NOPE_BLOCK, HIDES)
        shared = load_tile(kr, n, kr_stride, end, BLOCK_N, ROPE, ROPE_BLOCK, HIDES)
        score = tl.dot(qn, tl.trans(k), input_precision="ieee")
        score = dot(qr, tl.trans(shared), score) * scale
        if HIDES:
            score = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < sees[:, None], score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        # -inf - -inf is NaN: a query that has seen nothing yet gets another base.
        base = tl.where(highest == float("-inf"), 0.0, highest) if HIDES else highest
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        value = load_tile(kv + NOPE, n, kv_stride, end, BLOCK_N, V, V_BLOCK, HIDES)
        acc = dot(weight.to(value.dtype), value, acc * shrink[:, None])
        top = highest
    return acc, top, total


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    q_nope,
    q_rope,
    kv,
    k_rope,
    places,
    limits,
    out,
    lse,
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
    """Grid: B * H * ceil(T / BLOCK_M), query blocks that see the most keys first.

    A program keeps its queries and its part of the output in registers and walks the keys that its last query sees:
    first, without a mask, the blocks that all its queries see whole, then the diagonal and the row's end. A tensor's
    batch stride is *_rows times its row stride. `scale` includes log2(e), as exponentials have base 2. Programs past a
    sequence's last packed row do nothing.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    m = (blocks - 1 - pid % blocks) * BLOCK_M
    h = tl.cast(pid // blocks % H, tl.int64)
    b = tl.cast(pid // blocks // H, tl.int64)

    first, count = rows_of(b, limits, T, PACKED)
    if PACKED:  # noqa: SIM102  (the compiler must not see the inner condition otherwise)
        if m >= count:
            return
    sees, end, whole = seen_by(m, b, first, count, places, limits, S, BLOCK_M, PACKED)
    whole = whole // BLOCK_N * BLOCK_N

    qn_first = first if PACKED else b * qn_rows
    qr_first = first if PACKED else b * qr_rows
    qn = load_tile(q_nope + qn_first * qn_t + h * qn_h, m, qn_t, count, BLOCK_M, NOPE, NOPE_BLOCK, True)
    qr = load_tile(q_rope + qr_first * qr_t + h * qr_h, m, qr_t, count, BLOCK_M, ROPE, ROPE_BLOCK, True)
    kv += b * kv_rows * kv_s + h * kv_h
    k_rope += b * kr_rows * kr_s

    acc = tl.zeros((BLOCK_M, V_BLOCK), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = _over_keys(
        acc,
        top,
        total,
        qn,
        qr,
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
    acc, top, total = _over_keys(
        acc,
        top,
        total,
        qn,
        qr,
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

    first, count = rows_of(b, limits, T, PACKED)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    store_tile(out + first * H * V + h * V, m, H * V, count, acc, BLOCK_M, V, V_BLOCK)
    log = tl.where(total > 0.0, top + tl.log2(total), float("-inf"))
    row = m + tl.arange(0, BLOCK_M)
    tl.store(lse + lse_of(b, h, first, qn_rows, T, H, PACKED) + row, log, mask=row < count)
