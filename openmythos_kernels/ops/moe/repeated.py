"""One layer's experts called several times in a forward, as a loop does: their weights' gradients are summed in place.

Autograd adds the gradients that several calls return, each as large as the weights: memory traffic that grows with the
number of experts, used or not. Here the call whose backward runs first makes the gradients, the others add to them what
their tokens contribute, and an expert without a token costs nothing.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openmythos_kernels.ops.moe.experts import EXPERTS, EXPERTS_BACKWARD, EXPERTS_BACKWARD_ADD, check, one_each, regrouped

Lists = list[list[Tensor]]


class RepeatedExperts:
    """`moe_experts` with fixed weights for several calls whose results enter one loss.

    Autograd sees the weights once, before all calls, and an empty tensor in their place in every call: following
    hundreds of tensors through each takes longer than a GPU takes for the work. Good for one forward: the weights must
    not change before the backward, as everywhere in autograd.

    Args:
        weights: w_gate, w_up, w_down, shared_gate, shared_up, shared_down as of `moe_experts`.
        dtype: what float32 weights are rounded to, once for all calls; their gradients are then summed in it, as under
            autocast. None leaves them as they are.

    Attributes:
        dtype: of the weights in the calls.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]], dtype: Optional[torch.dtype] = None):
        flat = [w for ws in weights for w in ws]
        self._weights = regrouped([w.detach() for w in flat], [len(w) for w in weights])
        self._kept, self.dtype = flat[0].dtype, dtype or flat[0].dtype
        if self.dtype != self._kept:
            self._weights = _cast(self._weights, self.dtype)
        self._wanted = [any(w.requires_grad for ws in part for w in ws) for part in (weights[:3], weights[3:])]
        self._versions = [w._version for ws in self._weights for w in ws]
        self._sums: dict[int, Lists] = {}  # of the backward pass that runs, by its number
        self._anchor = _Weights.apply(self, *flat)

    def __call__(self, x: Tensor, expert_idx: Tensor, gates: Tensor) -> Tensor:
        """`moe_experts(x, expert_idx, gates, *weights)`."""
        check(x, expert_idx, gates, self._weights)
        return _Call.apply(self, x.contiguous(), expert_idx.contiguous(), gates.contiguous(), self._anchor)

    def call(self, x: Tensor, expert_idx: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        """The op's results, what its backward needs included."""
        return EXPERTS.below_autograd(x, expert_idx, gates, *self._weights, True)

    def gradients(self, need_x: bool, need_weights: bool, dy: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        """dx and dgates; the weights' gradients are kept, or added to those of a call before."""
        x, expert_idx, gates, *pre = saved
        task = torch._C._current_graph_task_id()
        sums = self._sums.get(task) if need_weights else None
        arguments = (dy, x, expert_idx, gates, *self._weights, *pre, need_x)
        if sums is not None:
            return EXPERTS_BACKWARD_ADD(*arguments, *sums)
        self._check_versions()
        wanted = self._wanted if need_weights else (False, False)
        dx, dgates, *sums = EXPERTS_BACKWARD(*arguments, *wanted, True)
        if need_weights:
            self._sums[task] = sums
        return dx, dgates

    def _check_versions(self) -> None:
        if [w._version for ws in self._weights for w in ws] != self._versions:
            raise RuntimeError("an expert's weight was modified in place between the forward and the backward")

    def summed(self) -> list[Optional[Tensor]]:
        """One gradient a weight; forgotten here, else the leaves would copy what is still held."""
        sums = self._sums.pop(torch._C._current_graph_task_id())
        if self.dtype != self._kept:
            sums = _cast(sums, self._kept)
        return [dw for dws in one_each(sums, [len(w) for w in self._weights]) for dw in dws]


def _cast(lists: Lists, dtype: torch.dtype) -> Lists:
    """Copies in another dtype, those of a list in one tensor: hundreds of matrices in a few launches."""
    copies = []
    for tensors in lists:
        to = list(tensors[0].new_empty(len(tensors), *tensors[0].shape, dtype=dtype).unbind()) if tensors else []
        if to:
            torch._foreach_copy_(to, tensors)
        copies.append(to)
    return copies


class _Weights(torch.autograd.Function):
    """What stands for the weights in every call; its backward runs once all calls' have."""

    @staticmethod
    def forward(ctx, repeated, *weights):
        ctx.repeated = repeated
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.repeated.summed()


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, repeated, x, expert_idx, gates, anchor):
        y, *pre = repeated.call(x, expert_idx, gates)
        ctx.repeated = repeated
        ctx.save_for_backward(x, expert_idx, gates, *pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        _, need_x, _, _, need_weights = ctx.needs_input_grad
        dx, dgates = ctx.repeated.gradients(need_x, need_weights, dy.contiguous(), *ctx.saved_tensors)
        return None, dx if need_x else None, None, dgates, dgates.new_empty(0) if need_weights else None
