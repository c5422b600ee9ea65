"""Launches of the norm's Triton kernels."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.norm.kernels.rms_norm import rms_norm_backward_kernel, rms_norm_kernel
from openmythos_kernels.runtime import target

_WIDEST = 32768  # bytes of a row that a program of the backward pass can hold; wider ones are the library's
_WIDEST_FUSED = 8192  # elements of a row whose sum's gradient the kernel adds; wider ones would spill


def forward(x, add, weight, eps):
    """`openmythos::rms_norm`."""
    check_for_triton("x", x)
    total = x.new_empty(0) if add is None else torch.empty_like(x)
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        D = weight.numel()
        rms_norm_kernel[(rstd.numel(),)](x, add, weight, total, y, rstd, D, eps, add is not None, **_constants(D))
    return total, y, rstd


def backward(grad_sum, grad, total, weight, rstd):
    """`openmythos::rms_norm_backward`."""
    dx, rows, D = torch.empty_like(total), rstd.numel(), weight.numel()
    if not total.numel():
        return dx, torch.zeros_like(weight)
    if D * total.element_size() > _WIDEST:
        return _library_backward(grad_sum, grad, total, weight, rstd)
    share = triton.cdiv(rows, 4 * target.current().units)
    parts = weight.new_empty((triton.cdiv(rows, share), D), dtype=torch.float32)
    fused = grad_sum is not None and D <= _WIDEST_FUSED
    rms_norm_backward_kernel[(len(parts),)](
        grad_sum, grad, total, weight, rstd, dx, parts, rows, share, D, fused, **_constants(D)
    )
    if grad_sum is not None and not fused:
        dx += grad_sum
    return dx, parts.sum(0).to(weight.dtype)  # in an order of the library's that is the same every time


def _library_backward(grad_sum, grad, total, weight, rstd):
    unit, g = total * rstd.unsqueeze(-1), grad.float()
    dweight = (g * unit).flatten(0, -2).sum(0)
    g = g * weight
    dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if grad_sum is not None:
        dx = dx + grad_sum
    return dx.to(total.dtype), dweight.to(weight.dtype)


def _constants(D: int) -> dict:
    """A row in one program, sixteen elements a thread, of the widest rows thirty-two."""
    block, warp = triton.next_power_of_2(D), target.current().warp
    each = 32 if block > 8192 else 16
    return dict(BLOCK=block, num_warps=max(1, min(1024 // warp, block // (each * warp))))
