"""`openmythos::moe_route`: the experts of each token, their weights, and the number of tokens of each expert.

The rule is that of `openmythos.moe.MoEFFN.route`: the top K of logits + bias are chosen, and a softmax over the K
chosen logits gives their weights, in which the bias has no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.moe import formula
from openmythos_kernels.ops.op import LIBRARY, Op


def moe_route(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses k experts for each token.

    Differentiable in logits, through topk_weights. Experts are in descending order of `logits + bias`, rounded to the
    dtype that PyTorch promotes the sum to. `torch.topk` does not define the order of equal sums: the CPU kernel follows
    it, and the Triton kernel takes the lower expert first. NaN counts as the largest, as in `torch.topk`. A token whose
    chosen logits contain NaN, or are all -inf, has NaN topk_weights; its indices are valid experts all the same.

    Args:
        logits: (N, E), one of FLOATS.
        bias: (E,), logits' dtype or float32; no gradient.
        k: experts per token, 1 <= k <= E.

    Returns:
        expert_idx (N, k) int64; topk_weights (N, k) in logits' dtype, whose rows sum to 1; load (E,) int64, the tokens
        of each expert.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    if logits.dim() != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits: got {logits.dtype} {tuple(logits.shape)}, must be a floating (N, E) tensor")
    experts = logits.shape[1]
    if bias.shape != (experts,) or bias.dtype not in (logits.dtype, torch.float32) or bias.device != logits.device:
        raise ValueError(
            f"bias: got {bias.dtype} {tuple(bias.shape)} on {bias.device}, "
            f"must be {logits.dtype} or float32 ({experts},) on {logits.device}"
        )
    if not 1 <= k <= experts:
        raise ValueError(f"k = {k}: must be in [1, {experts}], the number of experts")
    topk_weights, expert_idx, load = _route(logits.contiguous(), bias.contiguous(), k)
    return expert_idx, topk_weights, load


def _fake(logits, bias, k):
    shape = (logits.shape[0], k)
    return (
        logits.new_empty(shape),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(logits.shape[1:], dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    topk_weights, expert_idx, load = output
    ctx.experts = inputs[0].shape[1]
    ctx.mark_non_differentiable(expert_idx, load)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(expert_idx, topk_weights)


def _backward(ctx, dtopk_weights, *_):
    if dtopk_weights is None:
        return None, None, None
    return *_gradients(dtopk_weights.contiguous(), *ctx.saved_tensors, ctx.experts), None, None


_route = Op(
    "moe_route(Tensor logits, Tensor bias, int k) -> (Tensor topk_weights, Tensor expert_idx, Tensor load)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.moe.launch.route:forward",
    formula=formula.route,
)
_route_backward = Op(
    "moe_route_backward(Tensor dtopk_weights, Tensor expert_idx, Tensor topk_weights, int experts) -> Tensor",
    fake=lambda dtopk_weights, expert_idx, topk_weights, experts: topk_weights.new_empty(
        topk_weights.shape[0], experts
    ),
    triton="openmythos_kernels.ops.moe.launch.route:backward",
)
_gradients = Again(lambda *args: (_route_backward(*args),), lambda *args: (formula.route_backward(*args),))
# For devices without a kernel of their own.
LIBRARY.impl("moe_route", formula.route, "CompositeExplicitAutograd")
LIBRARY.impl("moe_route_backward", formula.route_backward, "CompositeExplicitAutograd")
