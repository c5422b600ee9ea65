"""A dense feed-forward layer as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.nn.guards import expert_obstacle
from openmythos_kernels.ops.moe.ffn import swiglu_ffn
from openmythos_kernels.runtime.backends import choose

NAMES = ("gate", "up", "down")


def ffn_obstacle(ffn, dtype: torch.dtype | None) -> str:
    """Why the op must not stand in for a block's FFN (a mixture of experts, a hook, an adapter); empty when it may."""
    if reason := expert_obstacle("ffn", ffn):
        return reason
    found = weights(ffn)
    if any(weight.dtype != dtype for weight in found):
        return "ffn has weights of another dtype"
    choice = choose("swiglu_ffn", found[0].device.type)
    return "" if choice.fast else choice.reason


def weights(ffn) -> list[Tensor]:
    """gate, up and down."""
    return [ffn._modules[name]._parameters["weight"] for name in NAMES]


def apply(ffn, x: Tensor, dtype: torch.dtype) -> Tensor:
    """ffn(x), products in `dtype`; the module is called where the op must not stand in for it."""
    if ffn_obstacle(ffn, x.dtype):
        return ffn(x)
    return swiglu_ffn(x.to(dtype), *(weight.to(dtype) for weight in weights(ffn)))
