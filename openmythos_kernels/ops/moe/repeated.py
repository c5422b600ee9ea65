"""A layer's experts, called several times in one forward, as a loop does: the weights' gradients are summed in place.

Autograd adds up the gradients that the calls return, each as large as the weights, so that memory traffic grows with
the number of experts, used or not. Here the first backward to run makes the gradients and the others add what their
tokens contribute; an expert without a token costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openmythos.compat import backward_pass, foreach_copy_
from openmythos_kernels.ops.derivatives import uncast
from openmythos_kernels.ops.flat import savable
from openmythos_kernels.ops.moe.experts import (
    EXPERTS,
    EXPERTS_BACKWARD,
    EXPERTS_BACKWARD_ADD,
    check,
    experts_gradients,
    one_each,
    regrouped,
)
from openmythos_kernels.ops.moe.once import Lists, Once, Rows
from openmythos_kernels.runtime.backends import choose


class RepeatedExperts:
    """`moe_experts` with fixed weights, for several calls whose results enter one loss.

    Autograd sees the weights once, before all calls, and an empty tensor in their place in every call: tracking
    hundreds of tensors through each call takes longer than the GPU's work. An object serves one forward. The weights
    must not change before the backward, as everywhere in autograd. Their gradients lie side by side in one block, each
    with a storage of its own; the pages of freed gradients go back to the system.

    Args:
        weights: w_gate, w_up, w_down, shared_gate, shared_up, shared_down, as for `moe_experts`.
        dtype: float32 weights are rounded to it once for all calls, and their gradients are summed in it, as under
            autocast. None leaves the weights as they are.
        once: bytes of rows that a backward may keep so that the routed weights' gradients are one product over all
            calls (`once.py`), where there are kernels for it. Beyond, each call adds its own.
        few: most tokens of a call whose rows are kept; a call of more adds its own product.

    Attributes:
        dtype: the weights' dtype in the calls.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[Tensor]],
        dtype: torch.dtype | None = None,
        once: float = 0,
        few: float = math.inf,
    ):
        flat = [w for ws in weights for w in ws]
        self.dtype = dtype or flat[0].dtype
        self._shared = _Shared(flat, [len(ws) for ws in weights], self.dtype, once, few)
        self._anchor = _Weights.apply(self._shared, *flat)

    def __call__(self, x: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """`moe_experts(x, expert_idx, topk_weights, *weights)`."""
        check(x, expert_idx, topk_weights, self._shared.weights)
        x, topk_weights = savable(x), savable(topk_weights)
        return _Call.apply(
            self._shared, x.contiguous(), expert_idx.contiguous(), topk_weights.contiguous(), self._anchor
        )


class _Shared:
    """The weights of all calls and the sums of their gradients. The graph refers to this object, so it must not refer
    to the graph."""

    def __init__(self, flat: list[Tensor], lengths: list[int], dtype: torch.dtype, once: float, few: float):
        self._given, self._lengths, self._dtype = flat, lengths, dtype
        self._limit, self._few = once, few
        self.weights = regrouped([w.detach() for w in flat], lengths)
        self._kept = flat[0].dtype
        if dtype != self._kept:
            self.weights = _cast(self.weights, dtype)
        parts = regrouped(flat, [sum(lengths[:3]), sum(lengths[3:])])
        self._wanted = [any(w.requires_grad for w in part) for part in parts]
        self._versions = [[w._version for w in read] for read in self._read()]
        self._tokens: list[int] = []  # of each call of few tokens
        self._sums: dict[int, Lists] = {}  # by the number of the backward pass
        self._once: dict[int, Once] = {}  # likewise

    def call(self, x: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, ...]:
        """The op's results, with those that its backward reads."""
        if len(x) <= self._few:
            self._tokens.append(len(x))
        return EXPERTS.below_autograd(x, expert_idx, topk_weights, *self.weights, True)

    def gradients(self, need_x: bool, need_weights: bool, dy: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        """dx and dtopk_weights; the weights' gradients are kept, or added to those of an earlier backward."""
        x, expert_idx, topk_weights, *pre = saved
        task = backward_pass()
        sums = self._sums.get(task) if need_weights else None
        graph = torch.is_grad_enabled()
        if need_weights and task in self._once:
            if len(x) <= self._few:
                return self._once[task].add(dy, x, expert_idx, topk_weights, pre, need_x)
            sums = self._sums[task] = _cast(self._once.pop(task).gradients(), self._dtype)
        if sums is not None and not graph:
            return EXPERTS_BACKWARD_ADD(dy, x, expert_idx, topk_weights, *self.weights, *pre, need_x, *sums)
        self._check_versions(graph)
        if need_weights and not graph and sums is None and self._is_once(x, expert_idx.shape[1]):
            calls, tokens, k, like = len(self._tokens), sum(self._tokens), expert_idx.shape[1], self._given[0].detach()
            self._once[task] = Once(self.weights, x, calls, tokens, k, like, self._wanted[1])
            return self._once[task].add(dy, x, expert_idx, topk_weights, pre, need_x)
        wanted = self._wanted if need_weights else (False, False)
        if graph:  # create_graph=True: gradients with a graph must not be changed in place
            weights = regrouped([w.to(self._dtype) for w in self._given], self._lengths)
            dx, dtopk_weights, *found = experts_gradients(
                dy, x, expert_idx, topk_weights, *weights, *pre, need_x, *wanted, False
            )
            if sums is not None:
                found = [[a + b for a, b in zip(*both)] for both in zip(sums, found)]
        else:
            dx, dtopk_weights, *found = EXPERTS_BACKWARD(
                dy, x, expert_idx, topk_weights, *self.weights, *pre, need_x, *wanted, True
            )
        if need_weights:
            self._sums[task] = found
        return dx, dtopk_weights

    def _is_once(self, x: Tensor, k: int) -> bool:
        """Whether the rows of this call and of the others of few tokens are kept, for one product."""
        if not self._limit or not self._wanted[0] or len(x) > self._few:
            return False
        if len(self._tokens) < 2 or not sum(self._tokens):
            return False
        fits = Rows.bytes(x, sum(self._tokens), k, len(self.weights[0][0])) <= self._limit
        return fits and choose("moe_experts_backward_rows", x.device.type).fast

    def _read(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights that plain gradients read, and those that differentiable gradients read."""
        return [w for ws in self.weights for w in ws], self._given

    def _check_versions(self, graph: bool) -> None:
        if [w._version for w in self._read()[graph]] != self._versions[graph]:
            raise RuntimeError("an expert's weight was modified in place between the forward and the backward")

    def summed(self) -> list[Tensor | None]:
        """One gradient a weight. Drops our reference, so that AccumulateGrad can steal the buffers."""
        task = backward_pass()
        sums = self._once.pop(task).gradients() if task in self._once else self._sums.pop(task)
        if self._dtype != self._kept:
            graph = torch.is_grad_enabled()
            sums = [[dw.to(self._kept) for dw in dws] for dws in sums] if graph else _cast(sums, self._kept)
        return [dw for dws in one_each(sums, self._lengths) for dw in dws]


def _cast(lists: Lists, dtype: torch.dtype) -> Lists:
    """Copies in another dtype, each list in one tensor: hundreds of matrices in a few launches. A list of that dtype
    stays as it is."""
    copies = []
    for tensors in lists:
        if tensors and tensors[0].dtype == dtype:
            copies.append(tensors)
            continue
        to = list(tensors[0].new_empty(len(tensors), *tensors[0].shape, dtype=dtype).unbind()) if tensors else []
        if to:
            foreach_copy_(to, tensors)
        copies.append(to)
    return copies


class _Weights(torch.autograd.Function):
    """Makes the empty tensor that stands for the weights in every call; its backward runs after those of all calls."""

    @staticmethod
    def forward(ctx, shared, *weights):
        ctx.shared = shared
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.shared.summed()


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shared, x, expert_idx, topk_weights, anchor):
        y, *pre = shared.call(x, expert_idx, topk_weights)
        ctx.shared = shared
        ctx.save_for_backward(x, expert_idx, topk_weights, *pre)
        return y

    @staticmethod
    @uncast
    def backward(ctx, dy):
        _, need_x, _, _, need_weights = ctx.needs_input_grad
        dx, dtopk_weights = ctx.shared.gradients(need_x, need_weights, dy.contiguous(), *ctx.saved_tensors)
        return None, dx if need_x else None, None, dtopk_weights, dtopk_weights.new_empty(0) if need_weights else None
