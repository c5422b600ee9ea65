"""Attention over a cache of latents: the walk of one split of a row's keys, and the merge of the splits."""

import triton
import triton.language as tl

from openmythos_kernels.ops.mla.kernels.tiles import dot, load_tile


@triton.jit
def _key_offsets(
    table,
    pages,
    b,
    n,
    last,
    latent_page,
    rope_page,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Offsets of keys n .. n + BLOCK_N of row b in the two caches. PAGE 0: in the row itself, else by the table."""
    key = n + tl.arange(0, BLOCK_N)
    if PAGE == 0:
        page = b
        inside = tl.cast(key, tl.int64)
    elif PAGE % BLOCK_N == 0:
        page = tl.load(table + b * pages + n // PAGE).to(tl.int64)
        inside = tl.cast(key % PAGE, tl.int64)
    else:
        page = tl.load(table + b * pages + key // PAGE, mask=key < last, other=0).to(tl.int64)
        inside = tl.cast(key % PAGE, tl.int64)
    return page * latent_page + inside * R, page * rope_page + inside * ROPE


@triton.jit(do_not_specialize=["B", "capacity", "pages", "splits"])
def attend_latent_kernel(
    q_latent,
    q_rope,
    latents,
    ropes,
    lengths,
    table,
    out,
    lse,
    B,
    capacity,
    pages,
    splits,
    latent_page,
    rope_page,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Grid: (B * ceil(H / BLOCK_H) * CHUNKS, splits).

    A program attends with BLOCK_H heads to its split of one row's keys. Scores are (keys, heads) and the result is
    (latent, heads): heads are the short side of a matrix instruction, which may be 8, and the long side needs no
    padding. A tile of latents is loaded once and used twice, as keys and, transposed, as values. For latents too wide
    for that (CHUNKS > 1) the scores are summed over chunks of R_BLOCK, and the program reads its own chunk again as
    values.

    A row's length, at most the capacity, divides its keys over the splits, in whole tiles. Without MERGE the only split
    writes out (B, H, R). With MERGE each split writes its mean to out (splits, B, H, R) float32 and the base-2 lse of
    its scores to lse (splits, B, H): -inf for an empty split, whose mean is not written. `scale` includes log2(e).
    """
    tiles: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    split = tl.program_id(1)
    chunk = pid % CHUNKS
    h0 = pid // CHUNKS % tiles * BLOCK_H
    b = tl.cast(pid // (CHUNKS * tiles), tl.int64)

    length = tl.maximum(tl.minimum(tl.load(lengths + b), capacity), 0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    first = tl.minimum(split * share, length)
    last = tl.minimum(first + share, length)

    head = h0 + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, R_BLOCK)
    q_latent += b * H * R
    qr = load_tile(q_rope + b * H * ROPE, h0, ROPE, H, BLOCK_H, ROPE, ROPE_BLOCK, True)
    if CHUNKS == 1:
        ql = load_tile(q_latent, h0, R, H, BLOCK_H, R, R_BLOCK, True)

    acc = tl.zeros((R_BLOCK, BLOCK_H), tl.float32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for n in range(first, last, BLOCK_N):
        to_latent, to_rope = _key_offsets(table, pages, b, n, last, latent_page, rope_page, R, ROPE, PAGE, BLOCK_N)
        held = (n + tl.arange(0, BLOCK_N) < last)[:, None]
        at = latents + to_latent[:, None] + channel[None, :]
        at_rope = ropes + to_rope[:, None] + tl.arange(0, ROPE_BLOCK)[None, :]
        shared = tl.load(at_rope, mask=held & (tl.arange(0, ROPE_BLOCK) < ROPE)[None, :], other=0.0)
        if CHUNKS == 1:
            value = tl.load(at, mask=held & (channel < R)[None, :], other=0.0)
            score = tl.dot(value, tl.trans(ql), input_precision="ieee")
        else:
            score = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
            for c in tl.static_range(CHUNKS):
                inside = (channel + c * R_BLOCK < R)[None, :]
                part = tl.load(at + c * R_BLOCK, mask=held & inside, other=0.0)
                at_query = q_latent + head[:, None] * R + c * R_BLOCK + channel[None, :]
                query = tl.load(at_query, mask=(head < H)[:, None] & inside, other=0.0)
                score = dot(part, tl.trans(query), score)
            value = tl.load(at + chunk * R_BLOCK, mask=held & (channel + chunk * R_BLOCK < R)[None, :], other=0.0)
        score = dot(shared, tl.trans(qr), score) * scale
        score = tl.where(held, score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 0))  # finite, as the tile's first key is held
        weight = tl.exp2(score - highest[None, :])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weight, 0)
        acc = dot(tl.trans(value), weight.to(value.dtype), acc * shrink[None, :])
        top = highest

    acc = acc / tl.where(total > 0.0, total, 1.0)[None, :]
    column = channel + chunk * R_BLOCK
    mask = (column < R)[:, None] & (head < H)[None, :]
    if MERGE:
        row = split * tl.cast(B, tl.int64) + b
        if first < last:
            tl.store(out + row * H * R + head[None, :] * R + column[:, None], acc, mask=mask)
        if chunk == 0:
            tl.store(lse + row * H + head, tl.where(total > 0.0, top + tl.log2(total), float("-inf")), mask=head < H)
    else:
        tl.store(out + b * H * R + head[None, :] * R + column[:, None], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(means, lse, out, rows, splits, R: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = sum over splits of means[split, row] * 2^(lse[split, row] - lse of all), in order; 0 where all
    splits are empty.

    Grid: (rows = B * H, ceil(R / BLOCK)). The means of empty splits are not read.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    top = tl.cast(float("-inf"), tl.float32)
    total = tl.cast(0.0, tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        at = split * tl.cast(rows, tl.int64) + row
        log = tl.load(lse + at)
        highest = tl.maximum(top, log)
        base = tl.where(highest > float("-inf"), highest, 0.0)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(log - base)
        end = tl.where(log > float("-inf"), R, 0)
        mean = tl.load(means + at * R + column, mask=column < end, other=0.0)
        acc = acc * shrink + weight * mean
        total = total * shrink + weight
        top = highest
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * R + column, acc.to(out.dtype.element_ty), mask=column < R)
