"""Products of normed rows: RMSNorm is computed in the loop that reads the rows for the product.

The norm's scale is one number a row, so the rows go into the product without it and the result is multiplied by it:
rows are read once, and weights need not wait for a sum over the row. Numbers of float16 might overflow that way, so
there the scale comes first, at the price of a second walk.
"""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import product


@triton.jit
def _scale(squares, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(squares, 1) / D + eps)


@triton.jit
def _scale_before(x, valid, eps, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """The norm's scale of each row where the rows are of float16, else 1."""
    scale = tl.full((BM,), 1.0, tl.float32)
    if x.dtype.element_ty == tl.float16:
        d = tl.arange(0, BK)
        squares = tl.zeros((BM, BK), tl.float32)
        for k in range(0, D, BK):
            rows = tl.load(x + (k + d)[None, :], mask=valid[:, None] & (k + d < D)[None, :], other=0.0)
            squares += rows.to(tl.float32) * rows.to(tl.float32)
        scale = _scale(squares, eps, D)
    return scale


@triton.jit
def _scale_behind(squares, eps, before, D: tl.constexpr, HALF: tl.constexpr):
    """What the products are still to be multiplied by."""
    if HALF:
        return tl.full(before.shape, 1.0, tl.float32)
    else:
        return _scale(squares, eps, D)


@triton.jit
def _tile(x, valid, gain, before, k, D: tl.constexpr, BK: tl.constexpr):
    """Channels k .. k + BK of the rows in float32, and of the same times gain and `before` in their dtype."""
    d = k + tl.arange(0, BK)
    rows = tl.load(x + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    g = tl.load(gain + d, mask=d < D, other=0.0).to(tl.float32)
    return rows, (rows * before[:, None] * g[None, :]).to(x.dtype.element_ty)


@triton.jit
def normed_product(
    x, valid, gain, weight, there, eps, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """RMSNorm(x) @ weight^T, (BM, BN) float32.

    x: pointers to the rows, (BM, 1); zeros where not valid. weight: pointers to rows of D, (1, BN); zeros where not
    there. gain: (D,), the norm's weight.
    """
    before = _scale_before(x, valid, eps, D, BM, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM, BK), tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        rows, normed = _tile(x, valid, gain, before, k, D, BK)
        squares += rows * rows
        w = tl.load(weight + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        acc = product(acc, normed, w)
    return acc * _scale_behind(squares, eps, before, D, x.dtype.element_ty == tl.float16)[:, None]


@triton.jit
def normed_products(
    x, valid, gain, first, second, there, eps, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """`normed_product` with two weights, for which x is read once."""
    before = _scale_before(x, valid, eps, D, BM, BK)
    a = tl.zeros((BM, BN), tl.float32)
    b = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM, BK), tl.float32)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        here = there[None, :] & (d < D)[:, None]
        rows, normed = _tile(x, valid, gain, before, k, D, BK)
        squares += rows * rows
        a = product(a, normed, tl.load(first + d[:, None], mask=here, other=0.0))
        b = product(b, normed, tl.load(second + d[:, None], mask=here, other=0.0))
    behind = _scale_behind(squares, eps, before, D, x.dtype.element_ty == tl.float16)
    return a * behind[:, None], b * behind[:, None]
