"""Launches of the norm's Triton kernels."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.norm import configs
from openmythos_kernels.ops.norm.kernels.rms_norm import rms_norm_backward_kernel, rms_norm_kernel
from openmythos_kernels.runtime import target


def forward(x, add, weight, eps):
    """`openmythos::rms_norm`."""
    check_for_triton("x", x)
    total = x.new_empty(0) if add is None else torch.empty_like(x)
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        D = weight.numel()
        rms_norm_kernel[(rstd.numel(),)](
            x, add, weight, total, y, rstd, D, eps, add is not None, **configs.constants(D)
        )
    return total, y, rstd


def backward(grad_sum, grad, total, weight, rstd):
    """`openmythos::rms_norm_backward`."""
    dx, rows, D = torch.empty_like(total), rstd.numel(), weight.numel()
    if not total.numel():
        return dx, torch.zeros_like(weight)
    if D * total.element_size() > configs.WIDEST:
        return _library_backward(grad_sum, grad, total, weight, rstd)
    share = triton.cdiv(rows, 4 * target.current().units)
    parts = weight.new_empty((triton.cdiv(rows, share), D), dtype=torch.float32)
    fused = grad_sum is not None and D <= configs.WIDEST_FUSED
    rms_norm_backward_kernel[(len(parts),)](
        grad_sum, grad, total, weight, rstd, dx, parts, rows, share, D, fused, **configs.constants(D)
    )
    if grad_sum is not None and not fused:
        dx += grad_sum
    return dx, parts.sum(0).to(weight.dtype)  # the library sums in the same order every time


def _library_backward(grad_sum, grad, total, weight, rstd):
    unit, g = total * rstd.unsqueeze(-1), grad.float()
    dweight = (g * unit).flatten(0, -2).sum(0)
    g = g * weight
    dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if grad_sum is not None:
        dx = dx + grad_sum
    return dx.to(total.dtype), dweight.to(weight.dtype)
