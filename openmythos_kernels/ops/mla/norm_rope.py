"""`openmythos::mla_norm_rope`: RMS norm of a row's first channels, rotation of the rest, in one pass.

The element-wise work around the down- and up-projections of latent attention, in each of its three places:
[latent | rotary key] as `kv_down` makes it (both), the queries' latent (norm alone), and the rotary part of the
queries (rotation alone, of every head). Defined by `openmythos.layers.RMSNorm` and `apply_rope`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import KERNEL_FLOATS
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.ops.op import Op


def norm_rope(x: Tensor, freqs: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Norms x[..., :r] and rotates the adjacent channel pairs of x[..., r:].

    Args:
        x: (B, T, r + heads * rope), one of KERNEL_FLOATS; heads and r may be 0.
        freqs: (B, T, rope / 2, 2) or (1, T, rope / 2, 2) float32: (cos, sin) at each position.
        weight: (r,), x's dtype or, as autocast leaves it, float32. eps: of the norm.

    Returns:
        normed (B, T, r) and rotated (B, T, heads * rope), x's dtype; arithmetic is float32.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    if x.dim() != 3 or x.dtype not in KERNEL_FLOATS:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, must be (B, T, channels) in one of {KERNEL_FLOATS}")
    fits = weight.dim() == 1 and weight.numel() <= x.shape[-1]
    if not fits or weight.dtype not in (x.dtype, torch.float32) or weight.device != x.device:
        raise ValueError(
            f"weight: got {weight.dtype} {tuple(weight.shape)} on {weight.device}, "
            f"must be {x.dtype} or torch.float32 of at most {x.shape[-1]} elements on {x.device}"
        )
    B, T, width = x.shape
    half = freqs.shape[-2] if freqs.dim() == 4 else 0
    if (
        freqs.dtype != torch.float32
        or freqs.device != x.device
        or half < 1
        or freqs.shape not in ((B, T, half, 2), (1, T, half, 2))
        or (width - weight.numel()) % (2 * half)
    ):
        raise ValueError(
            f"freqs: got {freqs.dtype} {tuple(freqs.shape)} on {freqs.device}, "
            f"must be torch.float32 {(B, T, 'rope / 2', 2)} on {x.device}, "
            f"rope a divisor of {width - weight.numel()}; the first size may be 1"
        )
    return mla_norm_rope(x, freqs.contiguous(), weight.contiguous(), eps)


def _fake(x, freqs, weight, eps):
    B, T, width = x.shape
    r = weight.shape[0]
    return x.new_empty(B, T, r), x.new_empty(B, T, width - r)


def _setup_context(ctx, inputs, output):
    x, freqs, weight, ctx.eps = inputs
    ctx.save_for_backward(x, freqs, weight)


def _backward(ctx, grad_normed, grad_rotated):
    dx, dweight = _gradients(grad_normed.contiguous(), grad_rotated.contiguous(), *ctx.saved_tensors, ctx.eps)
    return dx, None, dweight, None


mla_norm_rope = Op(
    "mla_norm_rope(Tensor x, Tensor freqs, Tensor weight, float eps) -> (Tensor normed, Tensor rotated)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.mla.launch.norm_rope:forward",
    formula=formula.norm_rope,
)

mla_norm_rope_backward = Op(
    "mla_norm_rope_backward(Tensor grad_normed, Tensor grad_rotated, Tensor x, Tensor freqs, Tensor weight, float eps) "
    "-> (Tensor x, Tensor weight)",
    fake=lambda grad_normed, grad_rotated, x, freqs, weight, eps: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
    ),
    triton="openmythos_kernels.ops.mla.launch.norm_rope:backward",
)
_gradients = Again(mla_norm_rope_backward, formula.norm_rope_backward)
