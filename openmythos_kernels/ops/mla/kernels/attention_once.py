"""Per-head latent attention, backward in one pass over the scores; selected by OPENMYTHOS_UNPROVEN=1.

`attention_backward.py` computes scores and their gradients once for the queries and once for the keys: seven products
and two exponentials per score. Here the owner of a block of keys also makes that block's share of dQ: five products,
one exponential. Shares are added in float32, in turns (`turns.py`).

Until a GPU has measured both, the loop over queries stands here as well as in `attention_dkv_kernel`, which stays as it
was measured. Whichever is slower for narrow heads then goes.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.mla.kernels.attention import VARYING, bounds_of, lse_of, rows_of, seen_from
from openmythos_kernels.ops.mla.kernels.attention_backward import LOG2E, _load_lse, _rows_before
from openmythos_kernels.ops.mla.kernels.tiles import dot, load_tile, store_tile
from openmythos_kernels.ops.mla.kernels.turns import pass_turn_on, ticket, wait_for_turn


@triton.jit(do_not_specialize=["rows", "T"])
def attention_delta_kernel(
    grad_out, out, delta, rows, T, H: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """delta = rowsum(grad_out * out), laid out as the lse: (rows / T, H, T). Grid: (ceil(rows / ROWS), H)."""
    first = tl.cast(tl.program_id(0), tl.int64) * ROWS
    h = tl.cast(tl.program_id(1), tl.int64)
    grad = load_tile(grad_out + h * V, first, H * V, rows, ROWS, V, V_BLOCK, True)
    mean = load_tile(out + h * V, first, H * V, rows, ROWS, V, V_BLOCK, True)
    row = first + tl.arange(0, ROWS)
    inner = tl.sum(grad.to(tl.float32) * mean.to(tl.float32), 1)
    tl.store(delta + (row // T * H + h) * T + row % T, inner, mask=row < rows)


@triton.jit
def _add(sums, share, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a share to a tile of `sums`, which the first one begins.

    A tile is one piece of memory, padded, so that its addresses need no registers. They bypass the first level of the
    cache, where what another multiprocessor has added may be missing. A mask instead of a branch: Triton's pipeline
    moves a loop's branches behind everything else, and so behind the turn.
    """
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    at = sums + row * BLOCK + channel
    share += tl.load(at, mask=(row >= 0) & (not first), other=0.0, cache_modifier=".cg")
    tl.store(at, share, cache_modifier=".cg")


@triton.jit
def _finish(sums, out, m, stride, rows, natural, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a tile of `sums` to the rows of `out`."""
    at = sums + tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    store_tile(out, m, stride, rows, tl.load(at, cache_modifier=".cg") * natural, ROWS, WIDTH, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def attention_once_kernel(
    q_nope,
    q_rope,
    kv,
    k_rope,
    places,
    limits,
    lse,
    grad_out,
    delta,
    dq_nope,
    dq_rope,
    dkv,
    parts,
    sums,
    turns,
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
    """Grid: B * H * ceil(S / BLOCK_N). Results are those of `attention_dq_kernel` and `attention_dkv_kernel`.

    Scratch: `sums`, float32, BLOCK_M * (NOPE_BLOCK + ROPE_BLOCK) per sequence, head and block of queries; `turns`,
    int32 zeros, a counter of tickets and a count for each of these.

    A block of queries gets its shares from the first block of keys on. All programs walk the queries backwards, so that
    each starts at the last block, and those of a head move over the queries one behind the other. Forwards, a program
    would start at its diagonal, where all the programs before it have still to pass.
    """
    blocks, tiles = tl.cdiv(S, BLOCK_N), tl.cdiv(T, BLOCK_M)
    mine = ticket(turns)
    order = mine % blocks
    n = order * BLOCK_N
    h = tl.cast(mine // blocks % H, tl.int64)
    b = tl.cast(mine // blocks // H, tl.int64)
    turns += 1 + (b * H + h) * tiles
    sums += (b * H + h) * tiles * BLOCK_M * (NOPE_BLOCK + ROPE_BLOCK)
    first, count = rows_of(b, limits, T, PACKED)
    if PACKED:
        places += first
        end = seen_from(tl.load(places + count - 1, mask=count > 0, other=-1), S)
        before = _rows_before(n, places, count)
        before_next = _rows_before(n + BLOCK_N, places, count)
    else:
        begin, end = bounds_of(b, places, limits, count, S)
        before = tl.maximum(n - begin, 0)
        before_next = tl.maximum(n + BLOCK_N - begin, 0)
    valid = (n + tl.arange(0, BLOCK_N) < end)[:, None]

    # The first keys add zeros to queries that see nothing. Past the row's end there are only zeros of keys to write.
    stop = tl.where((n < end) | (n == 0), count, 0)
    begins = tl.minimum(before // BLOCK_M * BLOCK_M, stop)
    last_below = tl.where(n + BLOCK_N < end, before_next // BLOCK_M * BLOCK_M, count)  # no later keys add to these

    kv += b * kv_rows * kv_s + h * kv_h
    k = load_tile(kv, n, kv_s, end, BLOCK_N, NOPE, NOPE_BLOCK, True)
    value = load_tile(kv + NOPE, n, kv_s, end, BLOCK_N, V, V_BLOCK, True)
    shared = load_tile(k_rope + b * kr_rows * kr_s, n, kr_s, end, BLOCK_N, ROPE, ROPE_BLOCK, True)
    qn_first = first if PACKED else b * qn_rows
    qr_first = first if PACKED else b * qr_rows
    q_nope += qn_first * qn_t + h * qn_h
    q_rope += qr_first * qr_t + h * qr_h
    grad_out += (first * H + h) * V
    dq_nope += (first * H + h) * NOPE
    dq_rope += (first * H + h) * ROPE
    lse_first = lse_of(b, h, first, qn_rows, T, H, PACKED)
    lse += lse_first
    delta += lse_first

    # Scores are (keys, queries) here, the layout in which the products read them.
    natural = scale / LOG2E
    dkn = tl.zeros((BLOCK_N, NOPE_BLOCK), tl.float32)
    dkr = tl.zeros((BLOCK_N, ROPE_BLOCK), tl.float32)
    dv = tl.zeros((BLOCK_N, V_BLOCK), tl.float32)
    steps = tl.cdiv(stop - begins, BLOCK_M)
    for step in range(0, steps):
        m = begins + (steps - 1 - step) * BLOCK_M
        row = m + tl.arange(0, BLOCK_M)
        qn = load_tile(q_nope, m, qn_t, count, BLOCK_M, NOPE, NOPE_BLOCK, True)
        qr = load_tile(q_rope, m, qr_t, count, BLOCK_M, ROPE, ROPE_BLOCK, True)
        grad = load_tile(grad_out, m, H * V, count, BLOCK_M, V, V_BLOCK, True)
        score = tl.dot(k, tl.trans(qn), input_precision="ieee")
        score = dot(shared, tl.trans(qr), score)
        dweight = tl.dot(value, tl.trans(grad), input_precision="ieee")
        weight = tl.exp2(score * scale - _load_lse(lse, row, count)[None, :])
        at = tl.load(places + row, mask=row < count, other=-1).to(tl.int32) if PACKED else begin + row
        weight = tl.where((n + tl.arange(0, BLOCK_N))[:, None] <= at[None, :], weight, 0.0)
        dv = dot(weight.to(grad.dtype), grad, dv)
        inner = tl.load(delta + row, mask=row < count, other=0.0)
        dscore = (weight * (dweight - inner[None, :])).to(qn.dtype)
        dkn = dot(dscore, qn, dkn)
        dkr = dot(dscore, qr, dkr)
        dqn = tl.dot(tl.trans(dscore), k, input_precision="ieee")
        dqr = tl.dot(tl.trans(dscore), shared, input_precision="ieee")
        turn, part = turns + m // BLOCK_M, sums + m * (NOPE_BLOCK + ROPE_BLOCK)
        wait_for_turn(turn, order)
        _add(part, dqn, n == 0, BLOCK_M, NOPE_BLOCK)
        _add(part + BLOCK_M * NOPE_BLOCK, dqr, n == 0, BLOCK_M, ROPE_BLOCK)
        pass_turn_on(turn)

    for m in range(begins, tl.minimum(last_below, stop), BLOCK_M):
        part = sums + m * (NOPE_BLOCK + ROPE_BLOCK)
        _finish(part, dq_nope, m, H * NOPE, count, natural, BLOCK_M, NOPE, NOPE_BLOCK)
        _finish(part + BLOCK_M * NOPE_BLOCK, dq_rope, m, H * ROPE, count, natural, BLOCK_M, ROPE, ROPE_BLOCK)

    dkv += (b * S * H + h) * (NOPE + V)
    store_tile(dkv, n, H * (NOPE + V), S, tl.where(valid, dkn * natural, 0.0), BLOCK_N, NOPE, NOPE_BLOCK)
    store_tile(dkv + NOPE, n, H * (NOPE + V), S, tl.where(valid, dv, 0.0), BLOCK_N, V, V_BLOCK)
    batch = tl.cast(tl.num_programs(0) // blocks // H, tl.int64)
    parts += (h * batch + b) * S * ROPE
    store_tile(parts, n, ROPE, S, tl.where(valid, dkr * natural, 0.0), BLOCK_N, ROPE, ROPE_BLOCK)
