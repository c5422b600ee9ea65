"""`openmythos::mla_decode`: one new token per row through a whole latent-attention layer, against a cache.

At one token a layer is a handful of matrix-vector products, which cost less than the calls around them. So projections,
cache append, attention and output projection are one op. The up-projection of keys and values is absorbed (DeepSeek-V2,
arXiv 2405.04434, section 2.1.2): queries go into the latent space and the mean latent comes out of it, and the cache is
never expanded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos import debug
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime.backends import forced


def _fake(x, *_):
    return torch.empty_like(x)


mla_decode = Op(
    "mla_decode(Tensor x, Tensor freqs, Tensor(a!) latent_cache, Tensor(b!) rope_cache, Tensor lengths, "
    "Tensor q_down, Tensor q_norm, Tensor q_up_nope, Tensor q_up_rope, Tensor kv_down, Tensor kv_norm, Tensor kv_up, "
    "Tensor wo, int n_heads, int nope, int rope, int v, float eps) -> Tensor",
    fake=_fake,
    triton="openmythos_kernels.ops.mla.launch.decode:decode",
)


def decode(
    x: Tensor,
    freqs: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    lengths: Tensor,
    *,
    q_down: Tensor,
    q_norm: Tensor,
    q_up_nope: Tensor,
    q_up_rope: Tensor,
    kv_down: Tensor,
    kv_norm: Tensor,
    kv_up: Tensor,
    wo: Tensor,
    n_heads: int,
    nope: int,
    rope: int,
    v: int,
    eps: float,
) -> Tensor:
    """Appends one token per row to the caches and attends to all that they then hold.

    Inference only: it has no gradient. Sums are float32 (float64 for float64).

    Args:
        x: (B, D), one of FLOATS (float64 on a CPU only); all tensors but freqs and lengths have x's dtype.
        freqs: (B, rope / 2, 2) or (1, rope / 2, 2) float32: (cos, sin) at each new token's position.
        latent_cache: (B, C, r), normed latents; written at [b, lengths[b]]. Each row is densely packed; there may be
            gaps between rows. Nothing past lengths[b] is read.
        rope_cache: (B, C, rope), the rotated keys, which all heads share; laid out as latent_cache.
        lengths: (B,) int64, the tokens that each row holds already, in [0, C). A GPU does not write a token that has no
            room; a CPU and the debug switch refuse it.
        q_down: (q_rank, D). q_norm: (q_rank,). q_up_nope: (n_heads * nope, q_rank).
            q_up_rope: (n_heads * rope, q_rank). kv_down: (r + rope, D). kv_norm: (r,).
            kv_up: (n_heads * (nope + v), r). wo: (D, n_heads * v). As in `openmythos.MLAttention`.
        n_heads, nope, rope, v: numbers of heads and of channels per head.
        eps: of both norms.

    Returns:
        (B, D), x's dtype.

    Raises:
        ValueError: a shape, dtype or stride is not as above; names the argument.
    """
    caches = (latent_cache, rope_cache)
    weights: Any = (q_down, q_norm, q_up_nope, q_up_rope, kv_down, kv_norm, kv_up, wo)
    if type(x) is not Tensor or x.device.type != "cpu" or forced() is not None:
        # On a CPU the kernel checks: in Python that takes longer than everything else.
        check_layer(x, freqs, *caches, lengths, weights, n_heads, nope, rope, v)
        if not x.numel():
            return torch.empty_like(x)
        x, freqs, lengths, *weights = (t.contiguous() for t in (x, freqs, lengths, *weights))
    return mla_decode(x, freqs, *caches, lengths, *weights, n_heads, nope, rope, v, eps)


def check_layer(x, freqs, latent_cache, rope_cache, lengths, weights, n_heads, nope, rope, v) -> None:
    """Raises the ValueErrors of `decode`, for devices whose kernels are launched from Python. weights: in its order."""
    rows, dim = _matrix("x", x)
    if x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype}, must be one of {FLOATS}")
    capacity, r = _cache("latent_cache", latent_cache, rows, x.dtype)
    q_rank = weights[0].shape[0]
    if rope % 2 or min(n_heads, nope, rope, v) < 1:
        raise ValueError(f"n_heads, nope, rope, v: got {(n_heads, nope, rope, v)}, must be positive and rope even")
    dtype = x.dtype
    shapes = {
        "q_down": (q_rank, dim),
        "q_norm": (q_rank,),
        "q_up_nope": (n_heads * nope, q_rank),
        "q_up_rope": (n_heads * rope, q_rank),
        "kv_down": (r + rope, dim),
        "kv_norm": (r,),
        "kv_up": (n_heads * (nope + v), r),
        "wo": (dim, n_heads * v),
    }
    for tensor, (name, shape) in zip(weights, shapes.items()):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be {dtype} {shape}")
    if _cache("rope_cache", rope_cache, rows, x.dtype) != (capacity, rope):
        raise ValueError(f"rope_cache: got shape {tuple(rope_cache.shape)}, must be {(rows, capacity, rope)}")
    if freqs.dtype != torch.float32 or freqs.shape not in ((rows, rope // 2, 2), (1, rope // 2, 2)):
        raise ValueError(
            f"freqs: got {freqs.dtype} {tuple(freqs.shape)}, must be torch.float32 {(rows, rope // 2, 2)}, "
            "the first size may be 1"
        )
    if lengths.dtype != torch.int64 or lengths.shape != (rows,):
        raise ValueError(f"lengths: got {lengths.dtype} {tuple(lengths.shape)}, must be torch.int64 {(rows,)}")
    debug.check_values("lengths", lengths, lambda n: (n >= 0) & (n < capacity), f"in [0, {capacity})")


def _matrix(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, must be (B, D)")
    return x.shape[0], x.shape[1]


def _cache(name: str, cache: Tensor, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(capacity, width) of a cache, which is written in place and so cannot be made dense or converted."""
    shape = cache.shape
    if len(shape) != 3 or shape[0] != rows or cache.dtype != dtype or cache.stride()[1:] != (shape[2], 1):
        raise ValueError(
            f"{name}: got {cache.dtype} {tuple(shape)} with strides {cache.stride()}, "
            f"must be {dtype} ({rows}, capacity, width) with each row densely packed"
        )
    return shape[1:]
