"""`openmythos::rms_norm`: RMSNorm (Zhang & Sennrich, 2019) of a tensor, or of a residual sum, which is returned too."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.norm import formula
from openmythos_kernels.ops.op import Op


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension, as `openmythos.RMSNorm`.

    Args:
        x: (..., D), one of FLOATS. weight: (D,) in x's dtype.

    Returns:
        (..., D) in x's dtype; the arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(x, weight)
    return RMS_NORM(x.contiguous(), None, weight.contiguous(), eps)[1]


def add_rms_norm(x: Tensor, add: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`s = x + add` and `rms_norm(s, weight, eps)` in one pass; the norm reads s rounded to its dtype.

    Args:
        x, add: (..., D), one of FLOATS. weight: (D,) in x's dtype.

    Returns:
        s and its norm, both (..., D) in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(x, weight)
    if add.shape != x.shape or add.dtype != x.dtype or add.device != x.device:
        raise ValueError(
            f"add: got {add.dtype} of shape {tuple(add.shape)} on {add.device}, "
            f"expected {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )
    return RMS_NORM(x.contiguous(), add.contiguous(), weight.contiguous(), eps)[:2]


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected (..., D) in one of {FLOATS}")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight: got {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}, "
            f"expected {x.dtype} of shape {tuple(x.shape[-1:])} on {x.device}"
        )


def _fake(x: Tensor, add: Tensor | None, weight: Tensor, eps: float):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((0,)) if add is None else torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(x.shape[:-1], dtype=wide),
    )


def _setup_context(ctx, inputs, output):
    x, add, weight, ctx.eps = inputs
    total, _, rstd = output
    ctx.added = add is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((rstd,) if ctx.added else (rstd, total)))
    ctx.save_for_backward(total if ctx.added else x, weight, rstd)


def _backward(ctx, grad_sum, grad, _rstd):
    total, weight, rstd = ctx.saved_tensors
    if grad is None:  # only the sum was used
        return grad_sum, grad_sum, None, None
    grad_sum = grad_sum.contiguous() if ctx.added and grad_sum is not None else None
    dx, dweight = _gradients(ctx.eps, grad_sum, grad.contiguous(), total, weight, rstd)
    return dx, dx if ctx.added else None, dweight, None


RMS_NORM = Op(
    "rms_norm(Tensor x, Tensor? add, Tensor weight, float eps) -> (Tensor sum, Tensor y, Tensor rstd)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.norm.launch.rms_norm:forward",
    formula=formula.rms_norm,
)
RMS_NORM_BACKWARD = Op(
    "rms_norm_backward(Tensor? grad_sum, Tensor grad, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda grad_sum, grad, total, weight, rstd: (torch.empty_like(total), torch.empty_like(weight)),
    triton="openmythos_kernels.ops.norm.launch.rms_norm:backward",
)
_gradients = Again(lambda eps, *args: RMS_NORM_BACKWARD(*args), formula.rms_norm_backward)
