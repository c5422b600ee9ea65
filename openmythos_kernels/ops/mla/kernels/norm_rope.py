"""RMSNorm of a row's first R channels and rotation of its other channels: forward, into the cache, and backward."""

import triton
import triton.language as tl

from openmythos_kernels.ops.norm.kernels.rms_norm import through_norm


@triton.jit
def _normed(x, weight, eps, R: tl.constexpr, BLOCK: tl.constexpr):
    """The normed row in float32."""
    channel = tl.arange(0, BLOCK)
    value = tl.load(x + channel, mask=channel < R, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=channel < R, other=0.0).to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value, 0) / R + eps) * w


@triton.jit
def _rotate(x, out, freqs, sign, PAIRS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Rotates PAIRS channel pairs by the angles of freqs (HALF, 2), the same for each head; sign -1 rotates back."""
    for first in tl.static_range(0, PAIRS, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        mask = pair < PAIRS
        cos = tl.load(freqs + pair % HALF * 2, mask=mask, other=0.0)
        sin = tl.load(freqs + pair % HALF * 2 + 1, mask=mask, other=0.0) * sign
        even = tl.load(x + 2 * pair, mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(x + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + 2 * pair, (even * cos - odd * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(out + 2 * pair + 1, (even * sin + odd * cos).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "freqs_rows", "x_rows"])
def norm_rope_kernel(
    x,
    freqs,
    weight,
    normed,
    rotated,
    T,
    freqs_rows,
    x_rows,
    x_t,
    eps,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    R_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Grid: B * T, one program a row. freqs_rows: rows of freqs per batch row, 0 if all batch rows share them."""
    row = tl.cast(tl.program_id(0), tl.int64)
    b, t = row // T, row % T
    x += (b * x_rows + t) * x_t
    if R > 0:
        channel = tl.arange(0, R_BLOCK)
        tl.store(
            normed + row * R + channel,
            _normed(x, weight, eps, R, R_BLOCK).to(normed.dtype.element_ty),
            mask=channel < R,
        )
    if PAIRS > 0:
        _rotate(x + R, rotated + row * 2 * PAIRS, freqs + (b * freqs_rows + t) * 2 * HALF, 1.0, PAIRS, HALF, PAIR_BLOCK)


@triton.jit(do_not_specialize=["T", "freqs_rows", "capacity", "pages"])
def append_kernel(
    kv,
    freqs,
    weight,
    latents,
    ropes,
    lengths,
    table,
    T,
    freqs_rows,
    capacity,
    pages,
    latent_page,
    rope_page,
    eps,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    R_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Grid: B * T. Token t of row b goes to place lengths[b] + t: in the row itself (PAGE 0), else by the table. A
    place outside the capacity is not written."""
    row = tl.cast(tl.program_id(0), tl.int64)
    b, t = row // T, row % T
    place = tl.load(lengths + b) + t
    if (place < 0) | (place >= capacity):
        return
    page = b
    if PAGE > 0:
        page = tl.load(table + b * pages + place // PAGE).to(tl.int64)
        place = place % PAGE
    kv += row * (R + 2 * PAIRS)
    channel = tl.arange(0, R_BLOCK)
    tl.store(
        latents + page * latent_page + place * R + channel,
        _normed(kv, weight, eps, R, R_BLOCK).to(latents.dtype.element_ty),
        mask=channel < R,
    )
    _rotate(
        kv + R,
        ropes + page * rope_page + place * 2 * PAIRS,
        freqs + (b * freqs_rows + t) * 2 * HALF,
        1.0,
        PAIRS,
        HALF,
        PAIR_BLOCK,
    )


@triton.jit(do_not_specialize=["N", "T", "freqs_rows", "x_rows", "share"])
def norm_rope_backward_kernel(
    grad_normed,
    grad_rotated,
    x,
    freqs,
    weight,
    dx,
    dweight,
    N,
    T,
    freqs_rows,
    x_rows,
    x_t,
    share,
    eps,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    R_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Grid: ceil(N / share). A program walks `share` of the N = B * T rows and writes its part of the weight's
    gradient to dweight[program] (programs, R) float32."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    channel = tl.arange(0, R_BLOCK)
    w = tl.zeros((R_BLOCK,), tl.float32)
    if R > 0:
        w = tl.load(weight + channel, mask=channel < R, other=0.0).to(tl.float32)
    part = tl.zeros((R_BLOCK,), tl.float32)
    for index in range(pid * share, tl.minimum(pid * share + share, N)):
        row = tl.cast(index, tl.int64)
        b, t = row // T, row % T
        to = dx + row * (R + 2 * PAIRS)
        if R > 0:
            value = tl.load(x + (b * x_rows + t) * x_t + channel, mask=channel < R, other=0.0).to(tl.float32)
            grad = tl.load(grad_normed + row * R + channel, mask=channel < R, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(value * value, 0) / R + eps)
            unit = value * rstd
            part += grad * unit
            grad *= w
            tl.store(to + channel, through_norm(grad, unit, rstd, R).to(dx.dtype.element_ty), mask=channel < R)
        if PAIRS > 0:
            _rotate(
                grad_rotated + row * 2 * PAIRS,
                to + R,
                freqs + (b * freqs_rows + t) * 2 * HALF,
                -1.0,
                PAIRS,
                HALF,
                PAIR_BLOCK,
            )
    if R > 0:
        tl.store(dweight + pid * R + channel, part, mask=channel < R)
