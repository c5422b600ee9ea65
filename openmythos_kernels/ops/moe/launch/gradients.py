"""The gradients of the experts' weights: their memory, and the launches that compute them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from openmythos_kernels.ops.moe import configs
from openmythos_kernels.ops.moe.kernels.experts_weights import down_weights_kernel, up_weights_kernel
from openmythos_kernels.ops.moe.launch.weights import Experts
from openmythos_kernels.ops.moe.sort import Order


def allocated(experts: Experts, needed: bool) -> tuple:
    """Memory for the gradients of gate, up and down, stacked; empty lists if they are not needed."""
    if not needed:
        return [], [], []
    E, D, I = experts.E, experts.D, experts.I
    like = experts.gate[0]
    return like.new_empty(E, I, D), like.new_empty(E, I, D), like.new_empty(E, D, I)


def stacked(gradients: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """The tensor that the gradients in the list are views of; an empty list stays one."""
    if not gradients:
        return gradients
    first = gradients[0]
    step = first.numel() * first.element_size()
    if any(g.data_ptr() != first.data_ptr() + i * step for i, g in enumerate(gradients)):
        raise ValueError(
            "dw: the Triton kernels add to gradients that are adjacent in memory, as the first call made them"
        )
    return first.as_strided((len(gradients), *first.shape), (first.numel(), *first.stride()))


def launch(x, dy, dpre, act, order: Order | None, K: int, experts: Experts, dweights, add: bool) -> None:
    """Fills the stacked gradients `dweights`, or adds to them. order None: every expert sees every token."""
    N, R, (E, D, I) = x.shape[0], act.numel() // experts.I, (experts.E, experts.D, experts.I)
    offsets, pair = (None, None) if order is None else (order.offsets, order.pair)
    dgate, dup, ddown = dweights
    config = configs.experts("up_weights", x.element_size())
    up_weights_kernel[(E * triton.cdiv(I, config.m) * triton.cdiv(D, config.n),)](
        x, dpre, offsets, pair, dgate, dup, N, R, K, D, I, order is None, add, **config.constants()
    )
    config = configs.experts("down_weights", x.element_size())
    down_weights_kernel[(E * triton.cdiv(D, config.m) * triton.cdiv(I, config.n),)](
        dy, act, offsets, pair, ddown, N, K, D, I, order is None, add, **config.constants()
    )
