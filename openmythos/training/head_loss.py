"""Cross-entropy of a linear head without its logits: the forward pass makes the gradients, chunk by chunk.

Recomputing a chunk's logits in the backward pass takes a fourth product with the head's weight. The loss is the last
thing that a step computes, so that its gradients are known up to a factor as soon as a chunk's logits are there. Three
products are enough then (the idea of Liger Kernel, arXiv 2410.10989), here with PyTorch's own.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn as nn
from torch import Tensor

from openmythos.compat import GLOBAL_MODULE_HOOKS
from openmythos.layers import at_least_fp32

IGNORED = -100  # the target that `cross_entropy` ignores


def is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a head is a product with its weight and nothing else."""
    if type(head) is not nn.Linear or head.bias is not None or type(head.weight) is not nn.Parameter:
        return False
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    return not (any(hooks) or any(GLOBAL_MODULE_HOOKS) or "forward" in vars(head))


def head_sums(
    rows: Tensor, weight: Tensor, targets: Tensor, chunk: int, z_weight: float, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over N rows of cross-entropy and squared logsumexp of the logits `rows @ weight.T`.

    Args:
        rows: (N, D). weight: (V, D). targets: (N,) int64; IGNORED adds no cross-entropy.
        chunk: rows whose logits are in memory at a time.
        factors: (N,), of each row; None: 1.

    Returns:
        cross-entropy + z_weight * squared logsumexp, to differentiate once, and both sums alone without gradients;
        float32 (float64 for float64 rows). A backward pass with `create_graph` raises RuntimeError.
    """
    return _HeadSums.apply(rows, weight, targets, chunk, z_weight, factors, torch.is_grad_enabled())


class _HeadSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, targets, chunk, z_weight, factors, graded):
        wanted = [graded and needed for needed in (ctx.needs_input_grad[i] for i in (0, 1, 5))]
        entropy, z = (at_least_fp32(rows.new_zeros(())) for _ in range(2))
        # Added up in float32, where autograd would round to the weight's dtype after each chunk.
        d_weight = at_least_fp32(torch.zeros_like(weight)) if wanted[1] else None
        d_rows, d_factors = [], []
        split = [None] * len(rows) if factors is None else factors.split(chunk)
        for part, target, factor in zip(rows.split(chunk), targets.split(chunk), split):
            logits = nn.functional.linear(part, weight)  # in autocast's dtype
            dtype, logits = logits.dtype, at_least_fp32(logits)
            kept = target != IGNORED
            target = target.where(kept, 0)[:, None]
            logsumexp = logits.logsumexp(-1)
            each = (logsumexp - logits.gather(1, target)[:, 0]) * kept
            square = logsumexp.square()
            entropy += each.sum() if factor is None else (factor * each).sum()
            z += square.sum() if factor is None else (factor * square).sum()
            if wanted[2]:
                d_factors.append(each + z_weight * square)
            if not (wanted[0] or wanted[1]):
                continue
            # From here on `logits` are their own gradients.
            of_softmax = kept + 2 * z_weight * logsumexp
            of_target = -kept.to(logits.dtype)
            if factor is not None:
                of_softmax, of_target = of_softmax * factor, of_target * factor
            logits.sub_(logsumexp[:, None]).exp_().mul_(of_softmax[:, None])
            narrow = logits.scatter_add_(1, target, of_target[:, None]).to(dtype)
            if wanted[0]:
                d_rows.append((narrow @ weight).to(rows.dtype))
            if d_weight is not None:
                d_weight += narrow.T @ part
        ctx.save_for_backward(
            torch.cat(d_rows) if wanted[0] else None, d_weight, torch.cat(d_factors) if wanted[2] else None
        )
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(entropy, z)
        return entropy + z_weight * z, entropy, z

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():  # create_graph=True; the saved gradients would be constants
            raise RuntimeError("the loss of a plain head has first derivatives alone; chunk = 0 has second ones")
        d_rows, d_weight, d_factors = (None if x is None else grad * x for x in ctx.saved_tensors)
        d_weight = None if d_weight is None else d_weight.to(ctx.dtype)
        return d_rows, d_weight, None, None, None, d_factors, None
