"""Tiles of rows, for the kernels of latent attention.

Offsets inside a tile are 32-bit; a tile's address is 64-bit, as tensors may exceed 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base, first, stride, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):
    """Rows first .. first + ROWS of a matrix as (ROWS, BLOCK); zeros from row `end` (if CHECK) and channel WIDTH on."""
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    at = base + (row.to(tl.int64) * stride)[:, None] + channel[None, :]
    if WIDTH < BLOCK:
        if CHECK:
            return tl.load(at, mask=(row < end)[:, None] & (channel < WIDTH)[None, :], other=0.0)
        return tl.load(at, mask=(channel < WIDTH)[None, :], other=0.0)
    if CHECK:
        return tl.load(at, mask=(row < end)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(base, first, stride, end, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a tile's rows below `end` and channels below WIDTH, in the dtype of `base`."""
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    at = base + (row.to(tl.int64) * stride)[:, None] + channel[None, :]
    mask = (row < end)[:, None] & (channel < WIDTH)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; never TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")
