"""Launches of a dense SwiGLU layer: the library's products and one kernel between them.

open-mythos gives its dense layers an inner width of 4/3 of the model's, often an odd number, while tensor cores need
rows of multiples of 16 bytes. For many tokens the weights are copied and padded with zeros, which change no sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos_kernels.ops.moe.ffn import inner_width
from openmythos_kernels.ops.moe.launch import dense


def forward(x, gate, up, down, save):
    """`openmythos::swiglu_ffn`."""
    N, width = len(x), inner_width(len(x), len(gate), x.dtype)
    saved = x.new_empty((2, 1, N, width) if save else 0)
    if not N:
        return torch.empty_like(x), saved
    return dense.library_forward(x, _widened(width, gate, up, down), saved if save else None), saved


def backward(dy, x, gate, up, down, saved, need_x, need_weights):
    """`openmythos::swiglu_ffn_backward`."""
    width, inner, weights = saved.shape[-1], len(gate), (gate, up, down)
    if not len(x):
        return x.new_empty(x.shape if need_x else 0), *(w.new_zeros(w.shape if need_weights else 0) for w in weights)
    matrices = _widened(width, *weights)
    dweights = [[torch.empty_like(w)] if need_weights else [] for (w,) in matrices]
    dx = dense.library_backward(dy, x, matrices, saved, dweights, need_x, False)
    dx = x.new_empty(0) if dx is None else dx
    if not need_weights:
        return dx, *(w.new_empty(0) for w in weights)
    (dgate,), (dup,), (ddown,) = dweights
    return dx, dgate[:inner], dup[:inner], ddown[:, :inner].contiguous()


def _widened(width: int, gate: Tensor, up: Tensor, down: Tensor) -> list[list[Tensor]]:
    more = width - len(gate)
    if not more:
        return [[gate], [up], [down]]
    return [[F.pad(gate, (0, 0, 0, more))], [F.pad(up, (0, 0, 0, more))], [F.pad(down, (0, more))]]
