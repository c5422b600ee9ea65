"""Linear layers of few rows: behind a norm, or with what they are added to."""

import triton
import triton.language as tl

from openmythos_kernels.ops.layer.kernels.normed import normed_product
from openmythos_kernels.ops.layer.kernels.overlap import overlap
from openmythos_kernels.ops.moe.kernels.experts import from_inner
from openmythos_kernels.ops.moe.kernels.tiles import places


@triton.jit
def _normed_columns(
    x,
    gain,
    weight,
    out,
    N,
    block,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A block of BN columns of one layer, for this program's rows."""
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    c = block * BN + tl.arange(0, BN)
    rows = n.to(tl.int64)[:, None]
    at = weight + places(c, WIDTH, D)[None, :] * D
    y = normed_product(x + rows * D, n < N, gain, at, c < WIDTH, eps, D, BM, BN, BK)
    tl.store(out + rows * WIDTH + c[None, :], y.to(out.dtype.element_ty), mask=(n < N)[:, None] & (c < WIDTH)[None, :])


@triton.jit(do_not_specialize=["N"])
def normed_linear_kernel(
    x,
    gain,
    first,
    second,
    first_out,
    second_out,
    N,
    eps,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """RMSNorm(x) by two weights, (FIRST, D) and (SECOND, D), of which the second may have no row.

    Grid: (ceil(N / BM), ceil(FIRST / BN) + ceil(SECOND / BN)).
    """
    overlap(OVERLAP)
    columns: tl.constexpr = (FIRST + BN - 1) // BN
    block = tl.program_id(1)
    if block < columns:
        _normed_columns(x, gain, first, first_out, N, block, eps, D, FIRST, BM, BN, BK)
    if SECOND > 0:  # noqa: SIM102 - a branch of the compiler's
        if block >= columns:
            _normed_columns(x, gain, second, second_out, N, block - columns, eps, D, SECOND, BM, BN, BK)


@triton.jit(do_not_specialize=["N"])
def added_linear_kernel(
    x,
    weight,
    y,
    z,
    N,
    D: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """z = y + weight x for rows x of I and y of D. Grid: (ceil(N / BM), ceil(D / BN))."""
    overlap(OVERLAP)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = n.to(tl.int64)[:, None]
    acc = from_inner(tl.zeros((BM, BN), tl.float32), x + rows * I, n < N, weight, c, D, I, BK)
    here = (n < N)[:, None] & (c < D)[None, :]
    at = rows * D + c[None, :]
    acc += tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    tl.store(z + at, acc.to(z.dtype.element_ty), mask=here)
