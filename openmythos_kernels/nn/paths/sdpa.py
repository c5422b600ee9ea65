"""Training with PyTorch's fused attention, whose own gradients have none: where a graph of them is asked for, they come
from the reference's attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openmythos.attention import CausalMask, attend
from openmythos_kernels.ops.derivatives import gradients_of, uncast


class FusedAttend(torch.autograd.Function):
    """`forward(fused, q, k, v, mask)` is `fused(q, k, v, mask)`, which is `openmythos.attention.attend` without
    dropout."""

    @staticmethod
    def forward(ctx, fused: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | None) -> Tensor:
        ctx.fused, ctx.mask = fused, mask
        ctx.save_for_backward(q, k, v)
        ctx.run = _run(ctx, (q, k, v))
        return ctx.run[1].detach()

    @staticmethod
    @uncast
    def backward(ctx, dout: Tensor):
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *gradients_of(lambda *qkv: (attend(*qkv, ctx.mask, lambda w: w),), inputs, (dout,)), None
        # A graph that is kept may be asked again, but is not worth the memory of what fused attention saves.
        leaves, out = ctx.run or _run(ctx, inputs)
        ctx.run = None
        return None, *torch.autograd.grad(out, leaves, dout), None


def _run(ctx, inputs) -> tuple[list[Tensor], Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return leaves, ctx.fused(*leaves, ctx.mask)
