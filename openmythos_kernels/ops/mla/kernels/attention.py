"""Per-head latent attention, forward: one program per (query block, head, sequence).

Queries have one of two forms. Consecutive: q is (B, T, H, width), and query i of sequence b sees the keys up to
start[b] + i, below key_lengths[b]. PACKED: q is (N, H, width), rows offset[b] .. offset[b + 1] are of sequence b, and
row n sees the keys up to position[n], which ascends within a sequence. The kernels get (start, key_lengths) or
(position, offset) as `places` and `limits`. N is the number of rows of the tensors of queries, per sequence or in all;
T is the most rows of a sequence.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.mla.kernels.tiles import dot, load_tile, store_tile

VARYING = ["N", "T", "S", "qn_rows", "qr_rows", "kv_rows", "kr_rows"]


@triton.jit
def rows_of(b, h, limits, N, T, H: tl.constexpr, PACKED: tl.constexpr):
    """The first row and the number of rows of sequence b in tensors of queries, and where its lse for head h begins."""
    if PACKED:
        first = tl.load(limits + b)
        count = (tl.load(limits + b + 1) - first).to(tl.int32)
        lse_first = h * N + first
    else:
        first = b * T
        count = T
        lse_first = (b * H + h) * T
    return first, count, lse_first


@triton.jit
def seen_by(m, b, first, count, places, limits, S, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Of the queries m .. m + BLOCK_M of sequence b: how many keys each sees, any sees, and all see."""
    row = m + tl.arange(0, BLOCK_M)
    if PACKED:
        sees = tl.minimum(tl.load(places + first + row, mask=row < count, other=-1) + 1, S).to(tl.int32)
        any_sees = tl.minimum(tl.load(places + first + tl.minimum(m + BLOCK_M, count) - 1) + 1, S).to(tl.int32)
        all_see = tl.minimum(tl.load(places + first + m) + 1, S).to(tl.int32)
    else:
        begin = tl.load(places + b)
        held = tl.load(limits + b)
        sees = tl.minimum(begin + row + 1, held).to(tl.int32)
        any_sees = tl.minimum(begin + tl.minimum(m + BLOCK_M, count), held).to(tl.int32)
        all_see = tl.minimum(begin + m + 1, held).to(tl.int32)
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
    N,
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

    first, count, lse_first = rows_of(b, h, limits, N, T, H, PACKED)
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

    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    store_tile(out + (first * H + h) * V, m, H * V, count, acc, BLOCK_M, V, V_BLOCK)
    log = tl.where(total > 0.0, top + tl.log2(total), float("-inf"))
    row = m + tl.arange(0, BLOCK_M)
    tl.store(lse + lse_first + row, log, mask=row < count)
