"""The dtypes that ops take, each list once."""

from __future__ import annotations

import torch
from torch import Tensor

# What matrix instructions of GPUs take; Triton's kernels compute in float32 and take no float64.
KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What ops with a C++ or CUDA kernel take besides.
FLOATS = (*KERNEL_FLOATS, torch.float64)


def check_for_triton(name: str, x: Tensor) -> None:
    """Raises ValueError if the Triton kernels do not take x's dtype."""
    if x.dtype not in KERNEL_FLOATS:
        raise ValueError(f"{name}: got {x.dtype}, the Triton kernels take one of {KERNEL_FLOATS}")
