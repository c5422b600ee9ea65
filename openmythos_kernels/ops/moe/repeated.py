"""One layer's experts called several times in a forward, as a loop does: their weights' gradients are summed in place.

Autograd adds the gradients that several calls return, each as large as the weights: memory traffic that grows with the
number of experts, used or not. Here the call whose backward runs first makes the gradients, the others add to them what
their tokens contribute, and an expert without a token costs nothing.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from openmythos_kernels.ops.moe.experts import EXPERTS, EXPERTS_BACKWARD, EXPERTS_BACKWARD_ADD, check, one_each, regrouped

Lists = list[list[Tensor]]


class RepeatedExperts:
    """`moe_experts` with fixed weights, on a CPU, for several calls whose results enter one loss.

    Good for one forward: the weights must not change before the backward, as everywhere in autograd. Backward passes
    with `create_graph` sum as autograd does.

    Args:
        weights: w_gate, w_up, w_down, shared_gate, shared_up, shared_down as of `moe_experts`.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]]):
        self._lengths = [len(w) for w in weights]
        # Sums of the backward pass that runs, by its number. They lie in autograd's hands too, as the gradients that the
        # first call returned: the weights below, which nobody else uses, pass them on once all calls have been through.
        self._sums: dict[int, Lists] = {}
        self._weights = regrouped(_Once.apply(self._sums, *(w for ws in weights for w in ws)), self._lengths)
        self._wanted = [any(w.requires_grad for ws in part for w in ws) for part in (weights[:3], weights[3:])]

    def __call__(self, x: Tensor, expert_idx: Tensor, gates: Tensor) -> Tensor:
        """`moe_experts(x, expert_idx, gates, *weights)`."""
        check(x, expert_idx, gates, self._weights)
        flat = (w for ws in self._weights for w in ws)
        return _Call.apply(self, x.contiguous(), expert_idx.contiguous(), gates.contiguous(), *flat)

    def call(self, x: Tensor, expert_idx: Tensor, gates: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The op's results, what its backward needs included."""
        return EXPERTS.below_autograd(x, expert_idx, gates, *regrouped(flat, self._lengths), True)

    def gradients(self, need_x: bool, *tensors: Tensor) -> tuple[Optional[Tensor], Tensor, list[Optional[Tensor]]]:
        """dx, dgates, and the weights' gradients, nothing where they were added to those of a call before."""
        dy, x, expert_idx, gates, saved_routed, saved_shared, *flat = tensors
        weights = regrouped(flat, self._lengths)
        task = torch._C._current_graph_task_id()
        sums = None if torch.is_grad_enabled() else self._sums.get(task)
        arguments = (dy, x, expert_idx, gates, *weights, saved_routed, saved_shared, need_x)
        if sums is not None:
            dx, dgates = EXPERTS_BACKWARD_ADD(*arguments, *sums)
            return dx, dgates, [None] * len(flat)
        dx, dgates, *sums = EXPERTS_BACKWARD(*arguments, *self._wanted)
        if not torch.is_grad_enabled():
            self._sums[task] = sums
        return dx, dgates, [dw for dws in one_each(sums, self._lengths) for dw in dws]


class _Once(torch.autograd.Function):
    """The weights themselves, with a node of their own before them: it runs once all calls' backward passes have."""

    @staticmethod
    def forward(ctx, sums, *weights):
        ctx.sums = sums
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.sums.pop(torch._C._current_graph_task_id(), None)  # else the leaves would copy what is still held here
        return None, *gradients


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, repeated, x, expert_idx, gates, *flat):
        y, *saved = repeated.call(x, expert_idx, gates, flat)
        ctx.repeated, ctx.need_x = repeated, x.requires_grad
        ctx.save_for_backward(x, expert_idx, gates, *saved, *flat)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, dgates, dweights = ctx.repeated.gradients(ctx.need_x, dy.contiguous(), *ctx.saved_tensors)
        return None, dx if ctx.need_x else None, None, dgates, *dweights
