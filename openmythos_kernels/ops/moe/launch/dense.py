"""Experts that see every token, as one wide expert: forward and backward.

Few tokens go through the kernels of the sorted experts, which stream the weights once. Many tokens go through the
library's dense products, which run closer to the device's peak; only the activation between them is our kernel
(docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from openmythos_kernels.ops.moe import configs
from openmythos_kernels.ops.moe.kernels.activation import swiglu_backward_kernel, swiglu_kernel
from openmythos_kernels.ops.moe.kernels.experts import down_kernel, up_kernel
from openmythos_kernels.ops.moe.kernels.experts_backward import down_backward_kernel, up_backward_kernel
from openmythos_kernels.ops.moe.launch import gradients
from openmythos_kernels.ops.moe.launch.weights import Experts

Matrices = Sequence[Sequence[Tensor]]
_BLOCK = 1024  # elements of a program of the activation


def forward(x: Tensor, experts: Experts, pre: Tensor | None) -> Tensor:
    """The sum of the experts, (N, D). pre (2, E, N, I) receives the pre-activation; None: it is not kept."""
    if _by_library(x, experts):
        return library_forward(x, experts.matrices, pre)
    N, (E, D, I), size = x.shape[0], (experts.E, experts.D, experts.I), x.element_size()
    block = configs.rows(size, N)
    act, y = x.new_empty(E, N, I), torch.empty_like(x)
    config = configs.experts("up", size, block)
    up_kernel[(E * triton.cdiv(N, block) * triton.cdiv(I, config.n),)](
        x,
        None,
        None,
        None,
        *experts.gate,
        *experts.up,
        act,
        act if pre is None else pre,
        N,
        E * N,
        E,
        1,
        D,
        I,
        experts.aligned,
        pre is not None,
        True,
        **config.constants(),
    )
    config = configs.experts("gemv_dense_down", size) if block == configs.GEMV else configs.experts("down", size, block)
    down_kernel[(triton.cdiv(N, block) * triton.cdiv(D, config.n),)](
        act, None, None, *experts.down, y, N, E, D, I, experts.aligned, True, **config.constants()
    )
    return y


def backward(dy: Tensor, x: Tensor, experts: Experts, pre: Tensor, dweights, need_x: bool, add: bool) -> Tensor | None:
    """dx, or None. Fills dweights unless they are empty, or adds to them with `add`."""
    if _by_library(x, experts):
        return library_backward(dy, x, experts.matrices, pre, dweights, need_x, add)
    N, (E, D, I), size = x.shape[0], (experts.E, experts.D, experts.I), x.element_size()
    block = configs.rows(size, N)
    dpre, act = x.new_empty(2, E, N, I), x.new_empty(E, N, I)
    config = configs.experts("down_backward", size, block)
    down_backward_kernel[(E * triton.cdiv(N, block) * triton.cdiv(I, config.n),)](
        dy,
        None,
        None,
        None,
        None,
        *experts.down,
        pre,
        dpre,
        act,
        None,
        N,
        E * N,
        E,
        1,
        D,
        I,
        experts.aligned,
        True,
        **config.constants(),
    )
    dx = None
    if need_x:
        dx = torch.empty_like(x)
        config = configs.experts("up_backward", size, block)
        up_backward_kernel[(triton.cdiv(N, block) * triton.cdiv(D, config.n),)](
            dpre,
            None,
            None,
            *experts.gate,
            *experts.up,
            dx,
            N,
            E * N,
            E,
            D,
            I,
            experts.aligned,
            True,
            **config.constants(),
        )
    if len(dweights[0]):
        gradients.launch(x, dy, dpre, act, None, 1, experts, dweights, add)
    return dx


def _by_library(x: Tensor, experts: Experts) -> bool:
    return len(x) > configs.LIBRARY and experts.dtype == x.dtype  # kernels round float32 masters as they load


def library_forward(x: Tensor, matrices: Matrices, pre: Tensor | None) -> Tensor:
    """`forward` by the library's products; matrices: lists of gate, up and down."""
    N, I = len(x), len(matrices[0][0])
    act = x.new_empty(N, I)
    y: Any = None
    passing: Any = x.new_empty(2, N, I) if pre is None else None
    for e, (gate, up, down) in enumerate(zip(*matrices)):
        g, u = passing if pre is None else pre[:, e]
        torch.mm(x, gate.t(), out=g)
        torch.mm(x, up.t(), out=u)
        swiglu_kernel[(triton.cdiv(N * I, _BLOCK),)](g, u, act, N, I, BLOCK=_BLOCK)
        y = torch.mm(act, down.t()) if y is None else y.addmm_(act, down.t())
    return y


def library_backward(
    dy: Tensor, x: Tensor, matrices: Matrices, pre: Tensor, dweights, need_x: bool, add: bool
) -> Tensor | None:
    """`backward` by the library's products."""
    N, I = len(x), len(matrices[0][0])
    dpre, act, dact = x.new_empty(2, N, I), x.new_empty(N, I), x.new_empty(N, I)
    dx = None
    for e, (gate, up, down) in enumerate(zip(*matrices)):
        torch.mm(dy, down, out=dact)
        swiglu_backward_kernel[(triton.cdiv(N * I, _BLOCK),)](
            dact, pre[0, e], pre[1, e], dpre[0], dpre[1], act, N, I, BLOCK=_BLOCK
        )
        if need_x:
            dx = torch.mm(dpre[0], gate) if dx is None else dx.addmm_(dpre[0], gate)
            dx.addmm_(dpre[1], up)
        if len(dweights[0]):
            for dw, left, right in (
                (dweights[0][e], dpre[0], x),
                (dweights[1][e], dpre[1], x),
                (dweights[2][e], dy, act),
            ):
                torch.addmm(dw, left.t(), right, beta=float(add), out=dw)
    return dx
