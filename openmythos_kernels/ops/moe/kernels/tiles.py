"""What the expert kernels share: the rows of a program, the address of an expert's weight, SwiGLU.

Rows come in two forms. Sorted (DENSE = False): row r of `Order` is pair pair[r], expert by expert. Dense: each of
PARTS shared experts sees every token, in row part * N + token. A weight is a list of PARTS or E matrices: `base` points
to the first one, and expert e's begins offsets[e] elements after it (int64, may be negative).
"""

import triton
import triton.language as tl


@triton.jit
def expert_tile(tile, tiles, offsets, N, E: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """The expert of a tile, its first row and the end of the expert's rows; expert E and no rows past the last
    tile."""
    if DENSE:
        each = tl.cdiv(N, BLOCK)
        e = tile // each
        first = e * N + tile % each * BLOCK
        end = e * N + N
    else:
        e = tl.load(tiles + tile * 2)
        first = tl.load(tiles + tile * 2 + 1)
        end = tl.load(offsets + tl.minimum(e, E - 1) + 1)
    return e, first, end


@triton.jit
def token_of(r, valid, e, pair, N, K: tl.constexpr, DENSE: tl.constexpr):
    """The token of each row, int64."""
    if DENSE:  # noqa: SIM108 - a branch of the compiler's
        token = r - e * N
    else:
        token = tl.load(pair + r, mask=valid, other=0) // K
    return token.to(tl.int64)


@triton.jit
def matrix_of(base, offsets, e, ALIGNED: tl.constexpr):
    """The beginning of expert e's matrix. ALIGNED: all offsets are multiples of 16, which allows wide loads."""
    offset = tl.load(offsets + e)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return base + offset


@triton.jit
def places(index, rows: tl.constexpr, columns: tl.constexpr):
    """index, in a type wide enough for the offset of any element of such a matrix."""
    if rows * columns >= 2147483648:
        return tl.cast(index, tl.int64)
    else:
        return index


@triton.jit
def product(acc, a, b):
    """acc + a @ b in float32; b holds weights, and float32 masters are rounded to a's dtype."""
    return tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")


@triton.jit
def silu(g):
    return g / (1.0 + tl.exp(-g))


@triton.jit
def swiglu_gradients(dact, g, u):
    """The gradients of gate and up through act = silu(g) * u."""
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    s = silu(g)
    return dact * u * (sigmoid + s * (1.0 - sigmoid)), dact * s
