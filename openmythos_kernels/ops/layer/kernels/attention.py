"""A token's latent attention around the walk over the cache (`ops/mla/kernels/latent.py`): the queries in front of it,
with the append to the cache, and the values behind it."""

import triton
import triton.language as tl

from openmythos_kernels.ops.layer.kernels.normed import normed_product, normed_products
from openmythos_kernels.ops.layer.kernels.overlap import overlap
from openmythos_kernels.ops.mla.kernels.norm_rope import _normed, _rotate
from openmythos_kernels.ops.moe.kernels.tiles import product


@triton.jit
def _append(
    kv,
    freqs,
    lengths,
    kv_norm,
    latents,
    ropes,
    seen,
    row,
    capacity,
    freqs_rows,
    latent_row,
    rope_row,
    eps,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Appends a row's token at place lengths[row], if that is inside the capacity; seen: the row's keys with it."""
    place = tl.load(lengths + row)
    tl.store(seen + row, place + 1)
    if (place >= 0) & (place < capacity):
        kv += row * (R + ROPE)
        channel = tl.arange(0, R_BLOCK)
        normed = _normed(kv, kv_norm, eps, R, R_BLOCK).to(latents.dtype.element_ty)
        tl.store(latents + row * latent_row + place * R + channel, normed, mask=channel < R)
        to = ropes + row * rope_row + place * ROPE
        _rotate(kv + R, to, freqs + row * freqs_rows * ROPE, 1.0, ROPE // 2, ROPE // 2, PAIR_BLOCK)


@triton.jit
def _absorbed(
    c_q,
    valid,
    q_norm,
    q_up_nope,
    kv_up,
    q_latent,
    rows,
    h,
    chunk,
    eps,
    H: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """A head's query without position, in a chunk of the latent space. Every chunk computes the query again."""
    j = tl.arange(0, NOPE_BLOCK)
    at = q_up_nope + (h * NOPE + j)[None, :] * Q
    q = normed_product(c_q + rows * Q, valid, q_norm, at, j < NOPE, eps, Q, BM, NOPE_BLOCK, BK)
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    up = kv_up + (h * (NOPE + V) + j)[:, None] * R + r[None, :]
    absorbed = tl.load(up, mask=(j < NOPE)[:, None] & (r < R)[None, :], other=0.0)
    found = product(tl.zeros((BM, CHUNK), tl.float32), q.to(absorbed.dtype), absorbed)
    to = q_latent + (rows * H + h) * R + r[None, :]
    tl.store(to, found.to(q_latent.dtype.element_ty), mask=valid[:, None] & (r < R)[None, :])


@triton.jit
def _rotated(
    c_q,
    valid,
    freqs,
    q_norm,
    q_up_rope,
    q_rope,
    rows,
    h,
    freqs_rows,
    eps,
    H: tl.constexpr,
    Q: tl.constexpr,
    ROPE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """A head's query with position: even and odd channels are two products, so that a program has both of a pair."""
    j = tl.arange(0, PAIR_BLOCK)
    pair = j < ROPE // 2
    at = q_up_rope + (h * ROPE + 2 * j)[None, :] * Q
    even, odd = normed_products(c_q + rows * Q, valid, q_norm, at, at + Q, pair, eps, Q, BM, PAIR_BLOCK, BK)
    here = valid[:, None] & pair[None, :]
    angle = freqs + rows * freqs_rows * ROPE + 2 * j[None, :]
    cos = tl.load(angle, mask=here, other=0.0)
    sin = tl.load(angle + 1, mask=here, other=0.0)
    to = q_rope + (rows * H + h) * ROPE + 2 * j[None, :]
    tl.store(to, (even * cos - odd * sin).to(q_rope.dtype.element_ty), mask=here)
    tl.store(to + 1, (even * sin + odd * cos).to(q_rope.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["N", "capacity", "freqs_rows"])
def queries_kernel(
    c_q,
    kv,
    freqs,
    lengths,
    q_norm,
    kv_norm,
    q_up_nope,
    q_up_rope,
    kv_up,
    q_latent,
    q_rope,
    latents,
    ropes,
    seen,
    N,
    capacity,
    freqs_rows,
    latent_row,
    rope_row,
    eps,
    H: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    R_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What attention needs of the new tokens: programs of three kinds.

    Grid: (ceil(N / BM) * H * (ceil(R / CHUNK) + 1) + N,): of each tile of rows, a program per head and chunk and one
    per head; then one per row, which appends. freqs_rows: rows of freqs per row, 0 if all share one.
    """
    overlap(OVERLAP)
    chunks: tl.constexpr = (R + CHUNK - 1) // CHUNK
    each: tl.constexpr = H * (chunks + 1)
    pid = tl.program_id(0)
    queries = tl.cdiv(N, BM) * each
    n = pid // each * BM + tl.arange(0, BM)
    valid = n < N
    rows = n.to(tl.int64)[:, None]
    part = pid % each
    if pid >= queries:
        row = tl.cast(pid - queries, tl.int64)
        _append(
            kv,
            freqs,
            lengths,
            kv_norm,
            latents,
            ropes,
            seen,
            row,
            capacity,
            freqs_rows,
            latent_row,
            rope_row,
            eps,
            R,
            ROPE,
            R_BLOCK,
            PAIR_BLOCK,
        )
    elif part < H * chunks:
        h, chunk = part // chunks, part % chunks
        _absorbed(
            c_q,
            valid,
            q_norm,
            q_up_nope,
            kv_up,
            q_latent,
            rows,
            h,
            chunk,
            eps,
            H,
            Q,
            R,
            NOPE,
            V,
            NOPE_BLOCK,
            CHUNK,
            BM,
            BK,
        )
    else:
        h = part - H * chunks
        _rotated(c_q, valid, freqs, q_norm, q_up_rope, q_rope, rows, h, freqs_rows, eps, H, Q, ROPE, PAIR_BLOCK, BM, BK)


@triton.jit(do_not_specialize=["rows", "splits"])
def values_kernel(
    means,
    lse,
    kv_up,
    out,
    rows,
    splits,
    H: tl.constexpr,
    R: tl.constexpr,
    NOPE: tl.constexpr,
    V: tl.constexpr,
    R_BLOCK: tl.constexpr,
    BV: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A head's values of its mean latent: what `attend_latent_kernel` left in `splits` <= SPLITS parts is merged, BS at
    a time and in order, and goes through kv_up's rows of values. Zeros where all parts are empty.

    Grid: (rows = N * H, ceil(V / BV)). The means of empty splits are not read.
    """
    overlap(OVERLAP)
    row = tl.cast(tl.program_id(0), tl.int64)
    all_rows = tl.cast(rows, tl.int64)
    channel = tl.arange(0, R_BLOCK)
    split = tl.arange(0, SPLITS)
    logs = tl.load(lse + split * all_rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(logs, 0)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.exp2(logs - top), 0)
    mean = tl.zeros((R_BLOCK,), tl.float32)
    for first in range(0, splits, BS):
        s = first + tl.arange(0, BS)
        log = tl.load(lse + s * all_rows + row, mask=s < splits, other=float("-inf"))
        there = (log > float("-inf"))[:, None] & (channel < R)[None, :]
        at = means + (s * all_rows + row)[:, None] * R + channel[None, :]
        mean += tl.sum(tl.exp2(log - top)[:, None] * tl.load(at, mask=there, other=0.0), 0)
    mean = mean / tl.where(total > 0.0, total, 1.0)

    v = tl.program_id(1) * BV + tl.arange(0, BV)
    up = kv_up + (row % H * (NOPE + V) + NOPE + v)[:, None] * R + channel[None, :]
    weight = tl.load(up, mask=(v < V)[:, None] & (channel < R)[None, :], other=0.0).to(tl.float32)
    tl.store(out + row * V + v, tl.sum(weight * mean[None, :], 1).to(out.dtype.element_ty), mask=v < V)
