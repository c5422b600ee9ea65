"""`rms_norm` by the module of `openmythos`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from openmythos.layers import RMSNorm, at_least_fp32
from openmythos_kernels.ops.derivatives import gradients_of


def rms_norm(x: Tensor, add: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`openmythos::rms_norm`."""
    total = x if add is None else x + add
    with torch.no_grad():
        rstd = torch.rsqrt(at_least_fp32(total).square().mean(-1) + eps)
    return x.new_empty(0) if add is None else total, _norm(total, weight, eps), rstd


def rms_norm_backward(eps: float, grad_sum, grad, total, weight, rstd) -> tuple[Tensor, Tensor]:
    """`openmythos::rms_norm_backward`, whose arguments follow the norm's eps."""
    dx, dweight = gradients_of(lambda total, weight: (_norm(total, weight, eps),), (total, weight), (grad,))
    return dx if grad_sum is None else dx + grad_sum, dweight


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    layer: Any = SimpleNamespace(eps=eps, weight=weight)
    return RMSNorm.forward(layer, x)
