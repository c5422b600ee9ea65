"""Norms outside of blocks, by the op that computes those inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.layers import RMSNorm
from openmythos_kernels.nn.guards import global_hooks, obstacle
from openmythos_kernels.ops.norm import DTYPES, rms_norm
from openmythos_kernels.runtime.backends import choose


def normed(norm: Any, x: Tensor) -> Tensor:
    """`norm(x)`, (..., dim)."""
    if global_hooks() or obstacle("norm", norm, RMSNorm):
        return norm(x)
    weight = norm._parameters["weight"]
    fits = x.dtype == weight.dtype and x.dtype in DTYPES and x.device == weight.device
    if not fits or not choose("rms_norm", x.device.type).fast or (x.dtype == torch.float64 and not x.is_cpu):
        return norm(x)
    return rms_norm(x, weight, norm.eps)
