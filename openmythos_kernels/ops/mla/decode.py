"""`openmythos::mla_decode`: one new token per row through a whole latent-attention layer, against a cache.

At one token a layer is a handful of matrix-vector products, and the calls
around them cost more than they do; so projections, cache append, attention
and output projection are one op. The up-projection of keys and values is
absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): queries are carried
into the latent space and the mean latent is carried out of it, so the cache is
attended to as it lies and never expanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Appends the keys of one token per row to the cache and attends to everything it then holds.

    Inference only: nothing here has a gradient. Sums are taken in float32 (float64 for float64).

    Args:
        x: (B, D), one of FLOATS (float64 on CPUs only); every tensor but freqs and lengths has its dtype.
        freqs: (B, rope / 2, 2) or (1, rope / 2, 2) float32: (cos, sin) at each new token's position.
        latent_cache: (B, C, r), normed latents; written at [b, lengths[b]]. Rows may be apart from each
            other in memory, each is densely packed. Nothing behind lengths[b] is read.
        rope_cache: (B, C, rope), the rotated key that all heads share; as latent_cache.
        lengths: (B,) int64, the tokens each row holds already, all below C.
        q_down: (q_rank, D). q_norm: (q_rank,). q_up_nope: (n_heads * nope, q_rank).
            q_up_rope: (n_heads * rope, q_rank). kv_down: (r + rope, D). kv_norm: (r,).
            kv_up: (n_heads * (nope + v), r). wo: (D, n_heads * v). As in `openmythos.MLAttention`.
        n_heads, nope, rope, v: numbers of heads and of channels per head.
        eps: of both RMS norms.

    Returns:
        (B, D), x's dtype.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    arguments = (
        x,
        freqs,
        latent_cache,
        rope_cache,
        lengths,
        q_down,
        q_norm,
        q_up_nope,
        q_up_rope,
        kv_down,
        kv_norm,
        kv_up,
        wo,
    )
    if type(x) is not Tensor or x.device.type != "cpu" or forced() is not None:
        _check(*arguments, n_heads, nope, rope, v)  # on a CPU in C++, as Python takes longer to ask than all else does
        if not x.numel():
            return torch.empty_like(x)
        dense = (t if t is latent_cache or t is rope_cache else t.contiguous() for t in arguments)
        return mla_decode(*dense, n_heads, nope, rope, v, eps)
    return mla_decode(*arguments, n_heads, nope, rope, v, eps)


def _check(
    x,
    freqs,
    latent_cache,
    rope_cache,
    lengths,
    q_down,
    q_norm,
    q_up_nope,
    q_up_rope,
    kv_down,
    kv_norm,
    kv_up,
    wo,
    n_heads,
    nope,
    rope,
    v,
) -> None:
    """The ValueErrors of `decode`, for devices whose kernels are launched from Python."""
    rows, dim = _matrix("x", x)
    if x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype}, must be one of {FLOATS}")
    capacity, r = _cache("latent_cache", latent_cache, rows, x.dtype)
    q_rank = q_down.shape[0]
    if rope % 2 or min(n_heads, nope, rope, v) < 1:
        raise ValueError(f"n_heads, nope, rope, v: got {(n_heads, nope, rope, v)}, must be positive and rope even")
    dtype = x.dtype
    for name, tensor, shape in (
        ("q_down", q_down, (q_rank, dim)),
        ("q_norm", q_norm, (q_rank,)),
        ("q_up_nope", q_up_nope, (n_heads * nope, q_rank)),
        ("q_up_rope", q_up_rope, (n_heads * rope, q_rank)),
        ("kv_down", kv_down, (r + rope, dim)),
        ("kv_norm", kv_norm, (r,)),
        ("kv_up", kv_up, (n_heads * (nope + v), r)),
        ("wo", wo, (dim, n_heads * v)),
    ):
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


def _matrix(name: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, must be (B, D)")
    return x.shape


def _cache(name: str, cache: Tensor, rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(capacity, width) of a cache; it is written in place, so it cannot be made dense or converted here."""
    shape = cache.shape
    if len(shape) != 3 or shape[0] != rows or cache.dtype != dtype or cache.stride()[1:] != (shape[2], 1):
        raise ValueError(
            f"{name}: got {cache.dtype} {tuple(shape)} with strides {cache.stride()}, "
            f"must be {dtype} ({rows}, capacity, width) with each row densely packed"
        )
    return shape[1:]
