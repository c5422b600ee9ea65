"""`openmythos::moe_experts`: all experts of a layer, routed and shared, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again, saves
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.moe import formula
from openmythos_kernels.ops.op import Op

WEIGHTS = (
    "Tensor[] w_gate, Tensor[] w_up, Tensor[] w_down, Tensor[] shared_gate, Tensor[] shared_up, Tensor[] shared_down"
)


def moe_experts(
    x: Tensor,
    expert_idx: Tensor,
    topk_weights: Tensor,
    w_gate: Sequence[Tensor],
    w_up: Sequence[Tensor],
    w_down: Sequence[Tensor],
    shared_gate: Sequence[Tensor] = (),
    shared_up: Sequence[Tensor] = (),
    shared_down: Sequence[Tensor] = (),
) -> Tensor:
    """`y[n] = sum_k topk_weights[n, k] * expert_{expert_idx[n, k]}(x[n]) + sum_s shared_s(x[n])`.

    Every expert is `down(silu(gate x) * up x)`. Weights are lists of separate tensors, read in place: there is no
    packed copy that could go stale. Differentiable in everything but `expert_idx`; experts without a token get zero
    gradients.

    Args:
        x: (N, D), float32, float64, bfloat16 or float16.
        expert_idx: (N, K) int64 in [0, E).
        topk_weights: (N, K), x's dtype or float32.
        w_gate, w_up: E tensors (I, D); w_down: E tensors (D, I).
        shared_gate, shared_up: S tensors (Is, D); shared_down: S tensors (D, Is). S may be 0.
            All weights are in x's dtype, or all in float32 with x in bfloat16 or float16 (autocast). Then products are
            at least as precise as with weights rounded to x's dtype, and the weights' gradients are float32.

    Returns:
        (N, D) in x's dtype. Sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or list length does not fit, or an expert index is out of range.
    """
    weights = (w_gate, w_up, w_down, shared_gate, shared_up, shared_down)
    check(x, expert_idx, topk_weights, weights)
    save = saves((x, topk_weights, *weights))
    # The kernel checks every weight's shape and dtype, at a cost of nanoseconds, with ValueErrors of the same form.
    return EXPERTS(x.contiguous(), expert_idx.contiguous(), topk_weights.contiguous(), *weights, save)[0]


def check(x: Tensor, expert_idx: Tensor, topk_weights: Tensor, weights: Sequence[Sequence[Tensor]]) -> None:
    """Raises the ValueErrors of `moe_experts`, except those of single weights."""
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(f"x must be a floating (N, D) tensor, got {tuple(x.shape)} {x.dtype}")
    if expert_idx.dim() != 2 or expert_idx.shape[0] != x.shape[0] or expert_idx.dtype != torch.int64:
        raise ValueError(
            f"expert_idx must be (N, K) = ({x.shape[0]}, K) int64, got {tuple(expert_idx.shape)} {expert_idx.dtype}"
        )
    if topk_weights.shape != expert_idx.shape or topk_weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"topk_weights must be {tuple(expert_idx.shape)} {x.dtype} or float32, "
            f"got {tuple(topk_weights.shape)} {topk_weights.dtype}"
        )
    w_gate, w_up, w_down, shared_gate, shared_up, shared_down = weights
    if not w_gate or not len(w_gate) == len(w_up) == len(w_down):
        raise ValueError(f"w_gate, w_up, w_down must have E >= 1 entries, got {[len(w) for w in weights[:3]]}")
    if not len(shared_gate) == len(shared_up) == len(shared_down):
        raise ValueError(
            f"shared_gate, shared_up, shared_down must be equally long, got {[len(w) for w in weights[3:]]}"
        )


def _fake(x, expert_idx, topk_weights, w_gate, w_up, w_down, shared_gate, shared_up, shared_down, save):
    if not save:
        return x.new_empty(x.shape), x.new_empty((0,)), x.new_empty((0,))
    tokens, slots = expert_idx.shape
    shared_inner = shared_gate[0].shape[0] if shared_gate else 0
    return (
        x.new_empty(x.shape),
        x.new_empty((2, tokens * slots, w_gate[0].shape[0])),
        x.new_empty((2, len(shared_gate), tokens, shared_inner)),
    )


def _fake_backward(dy, x, expert_idx, topk_weights, *rest):
    *weights, _, _, need_x, need_routed, need_shared, _ = rest

    def like(weights, needed):
        return [w.new_empty(w.shape) for w in weights] if needed else []

    return (
        x.new_empty(x.shape if need_x else (0,)),
        topk_weights.new_empty(topk_weights.shape),
        *(like(w, need_routed) for w in weights[:3]),
        *(like(w, need_shared) for w in weights[3:]),
    )


def _setup_context(ctx, inputs, output):
    x, expert_idx, topk_weights, *weights, save = inputs
    _, saved_routed, saved_shared = output
    ctx.save = save
    ctx.lengths = [len(w) for w in weights]
    ctx.need_x = x.requires_grad
    ctx.need_routed = any(w.requires_grad for ws in weights[:3] for w in ws)
    ctx.need_shared = any(w.requires_grad for ws in weights[3:] for w in ws)
    ctx.set_materialize_grads(False)  # no zeros for the saved tensors
    ctx.save_for_backward(x, expert_idx, topk_weights, saved_routed, saved_shared, *(w for ws in weights for w in ws))


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    if not ctx.save:
        raise RuntimeError("moe_experts: gradients need the op to be called with save=True")
    x, expert_idx, topk_weights, saved_routed, saved_shared, *flat = ctx.saved_tensors
    weights = regrouped(flat, ctx.lengths)
    dx, dtopk_weights, *dweights = experts_gradients(
        dy.contiguous(),
        x,
        expert_idx,
        topk_weights,
        *weights,
        saved_routed,
        saved_shared,
        ctx.need_x,
        ctx.need_routed,
        ctx.need_shared,
        False,
    )
    return (dx if ctx.need_x else None, None, dtopk_weights, *one_each(dweights, ctx.lengths), None)


def regrouped(flat: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """`flat` cut into lists of these lengths."""
    items = iter(flat)
    return [list(itertools.islice(items, length)) for length in lengths]


def one_each(gradients: Sequence[list[Any]], lengths: Sequence[int]) -> list[list[Tensor | None]]:
    """The op's gradients in autograd's form, one entry a weight: an empty list means "not needed" and becomes Nones."""
    return [grads or [None] * length for grads, length in zip(gradients, lengths)]


EXPERTS = Op(
    f"moe_experts(Tensor x, Tensor expert_idx, Tensor topk_weights, {WEIGHTS}, bool save)"
    " -> (Tensor y, Tensor saved_routed, Tensor saved_shared)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.moe.launch.experts:forward",
    formula=formula.experts_whole,
)
# `more`: `moe_experts_backward_add` will add to the weights' gradients.
EXPERTS_BACKWARD = Op(
    f"moe_experts_backward(Tensor dy, Tensor x, Tensor expert_idx, Tensor topk_weights, {WEIGHTS},"
    " Tensor saved_routed, Tensor saved_shared, bool need_x, bool need_routed, bool need_shared, bool more)"
    " -> (Tensor dx, Tensor dtopk_weights, Tensor[] dw_gate, Tensor[] dw_up, Tensor[] dw_down,"
    " Tensor[] dshared_gate, Tensor[] dshared_up, Tensor[] dshared_down)",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.moe.launch.experts:backward",
)
experts_gradients = Again(EXPERTS_BACKWARD, formula.experts_backward)
EXPERTS_BACKWARD_ADD = Op(
    f"moe_experts_backward_add(Tensor dy, Tensor x, Tensor expert_idx, Tensor topk_weights, {WEIGHTS},"
    " Tensor saved_routed, Tensor saved_shared, bool need_x, Tensor(a!)[] dw_gate, Tensor(b!)[] dw_up,"
    " Tensor(c!)[] dw_down, Tensor(d!)[] dshared_gate, Tensor(e!)[] dshared_up, Tensor(f!)[] dshared_down)"
    " -> (Tensor dx, Tensor dtopk_weights)",
    fake=lambda dy, x, expert_idx, topk_weights, *rest: (
        x.new_empty(x.shape if rest[8] else (0,)),
        topk_weights.new_empty(topk_weights.shape),
    ),
    triton="openmythos_kernels.ops.moe.launch.experts:backward_add",
)
