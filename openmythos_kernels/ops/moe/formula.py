"""Routing and experts by the modules of `openmythos`, with the ops' arguments and results."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openmythos.layers import Expert
from openmythos.moe import MoEFFN
from openmythos_kernels.ops.derivatives import gradients_of


def route(logits: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_route`."""
    layer: Any = SimpleNamespace(router=lambda flat: flat, router_bias=bias, topk=k)
    expert_idx, topk_weights = MoEFFN.route(layer, logits)
    load = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    return topk_weights, expert_idx, load.scatter_add(0, expert_idx.flatten(), torch.ones_like(expert_idx).flatten())


def route_backward(dtopk_weights: Tensor, expert_idx: Tensor, topk_weights: Tensor, experts: int) -> Tensor:
    """`moe_route_backward`: the gradient of a softmax, from its result."""
    wide = torch.promote_types(topk_weights.dtype, torch.float32)
    g, dg = topk_weights.to(wide), dtopk_weights.to(wide)
    chosen = g * (dg - (g * dg).sum(-1, keepdim=True))
    return topk_weights.new_zeros(topk_weights.shape[0], experts).scatter(-1, expert_idx, chosen.to(topk_weights.dtype))


def experts(x, expert_idx, topk_weights, w_gate, w_up, w_down, shared_gate, shared_up, shared_down) -> Tensor:
    """The first result of `moe_experts`."""
    layer: Any = SimpleNamespace(
        route=lambda flat: (expert_idx, topk_weights),
        record_load=lambda expert_idx: None,
        idle_experts="zeros",
        exchange=None,
        routed_experts=[expert(*parts) for parts in zip(w_gate, w_up, w_down)],
        shared_experts=[expert(*parts) for parts in zip(shared_gate, shared_up, shared_down)],
    )
    layer.routed = partial(MoEFFN.routed, layer)
    return MoEFFN.forward(layer, x)


def experts_whole(*args) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_experts`, with nothing saved."""
    *inputs, _ = args
    return experts(*inputs), inputs[0].new_empty(0), inputs[0].new_empty(0)


def experts_backward(dy, x, expert_idx, topk_weights, *rest):
    """`moe_experts_backward`."""
    *weights, _, _, need_x, need_routed, need_shared, _ = rest
    dx, dtopk_weights, *dweights = gradients_of(
        lambda x, topk_weights, *weights: (experts(x, expert_idx, topk_weights, *weights),),
        (x, topk_weights, *weights),
        (dy,),
    )
    needed = [need_routed] * 3 + [need_shared] * 3
    return (
        dx if need_x else x.new_empty(0),
        dtopk_weights,
        *(dws if need else [] for dws, need in zip(dweights, needed)),
    )


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """`swiglu_ffn`, with nothing saved."""
    return expert(gate, up, down)(x), x.new_empty(0)


def ffn_backward(dy, x, gate, up, down, saved, need_x, need_weights):
    """`swiglu_ffn_backward`."""
    dx, *dweights = gradients_of(lambda x, *weights: (expert(*weights)(x),), (x, gate, up, down), (dy,))
    return dx if need_x else x.new_empty(0), *(dw if need_weights else dw.new_empty(0) for dw in dweights)


def expert(gate: Tensor, up: Tensor, down: Tensor):
    """`openmythos.layers.Expert` with these weights; float32 masters are rounded to x's dtype, as under autocast."""

    def linear(weight: Tensor):
        return lambda x: F.linear(x, weight.to(x.dtype))

    layer: Any = SimpleNamespace(gate=linear(gate), up=linear(up), down=linear(down))
    return partial(Expert.forward, layer)
