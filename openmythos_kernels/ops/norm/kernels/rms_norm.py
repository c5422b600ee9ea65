"""RMSNorm of a row, or of the sum of two rows, which is kept; arithmetic is float32."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, add, weight, total, y, rstd_out, D, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows,). total = x + add, rounded to its dtype; y = total * rstd * weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(add + row * D + column, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row * D + column, kept, mask=inside)
        value = kept.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + column, (value * rstd * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd_out + row, rstd)


@triton.jit
def through_norm(grad, unit, rstd, D):
    """The gradient of a row (BLOCK,): unit is the row times rstd, grad the gradient of the normed row times the weight.

    The loop step has a form of its own: its rows may be wider than what a program holds, so their sums come first.
    """
    return (grad - unit * (tl.sum(grad * unit, 0) / D)) * rstd


@triton.jit(do_not_specialize=["rows", "share"])
def rms_norm_backward_kernel(
    grad_sum, grad, total, weight, rstd_in, dx, parts, rows, share, D, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (ceil(rows / share),). A program walks `share` rows and writes its part of the weight's gradient to
    parts[program] (programs, D) float32."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    part = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * share, tl.minimum(program * share + share, rows)):
        at = tl.cast(row, tl.int64) * D
        rstd = tl.load(rstd_in + row)
        unit = tl.load(total + at + column, mask=inside, other=0.0).to(tl.float32) * rstd
        g = tl.load(grad + at + column, mask=inside, other=0.0).to(tl.float32)
        part += g * unit
        g *= tl.load(weight + column, mask=inside, other=0.0).to(
            tl.float32
        )  # loaded again: held across the loop, it makes the widest rows spill
        result = through_norm(g, unit, rstd, D)
        if HAS_SUM:
            result += tl.load(grad_sum + at + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at + column, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + program * D + column, part, mask=inside)
