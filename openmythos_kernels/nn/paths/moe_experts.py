"""Experts in two ops: routing, and all experts, routed and shared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from openmythos_kernels.nn.call import Call
from openmythos_kernels.nn.guards import expert_obstacle, global_hooks, kind_of, own_methods, weight_obstacle
from openmythos_kernels.ops.moe import DTYPES, moe_experts, moe_route
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "plain experts in the dtype that x is computed in (float32 master weights under autocast too)"
DIVIDED = "the experts are on several ranks"


def choice(layer) -> Choice:
    if layer.exchange is not None:
        return Choice("reference", DIVIDED)
    return over(layer, [*layer.routed_experts._modules.values(), *layer.shared_experts._modules.values()])


def over(layer, experts: Iterable[nn.Module]) -> Choice:
    """What the op over these experts runs on."""
    if reason := layer_obstacle(layer) or replaced(experts):
        return Choice("reference", reason)
    found = choose("moe_experts", a_weight(layer).device.type)
    reason = _weights(layer) if found.fast else ""
    return Choice("reference", reason) if reason else found


def refuses(call: Call) -> str:
    found = choice(call.module)
    return dtypes(call) if found.fast else found.reason


def run(call: Call) -> Tensor:
    layer, x = call.module, call.x
    flat, expert_idx, topk_weights, load = routed(call)
    experts, shared = list(layer.routed_experts._modules.values()), layer.shared_experts._modules.values()
    if layer.idle_experts == "none" and len(flat) and call.grad and call.free_shapes:
        expert_idx, experts = _only_used(expert_idx, load, experts)
    y = moe_experts(flat, expert_idx, topk_weights, *expert_weights(experts), *expert_weights(shared))
    return y.to(x.dtype).view_as(x)


def routed(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x as rows in the dtype of the products, expert_idx, topk_weights and load; the load is recorded."""
    layer, flat = call.module, call.x.reshape(-1, call.x.shape[-1])
    logits = layer.router(flat)
    expert_idx, topk_weights, load = moe_route(logits, layer.router_bias, layer.topk)
    layer.record_load(expert_idx, load)
    if layer.scores is not None:
        layer.scores.add(layer, logits, expert_idx)
    return flat.to(call.dtype), expert_idx, topk_weights.to(flat.dtype), load


def layer_obstacle(layer) -> str:
    """What ops would bypass of the layer itself; empty if nothing."""
    reason = own_methods("this layer", layer, kind_of(layer), called=True)
    return reason or weight_obstacle("router_bias", layer._buffers.get("router_bias"), 1)


def replaced(experts: Iterable[nn.Module]) -> str:
    """What an op would skip in silence by not calling the experts; empty when nothing."""
    if reason := global_hooks():
        return reason
    for expert in experts:
        if reason := expert_obstacle("an expert", expert):
            return reason
    return ""


def dtypes(call: Call) -> str:
    """Why the op cannot compute x with plain weights of their dtype and device; empty when it can."""
    weight, x = a_weight(call.module), call.x
    if reason := _weights(call.module):
        return reason
    if x.device != weight.device:
        return f"x is on {x.device}, weights on {weight.device}"
    # Under autocast float32 master weights are read as they are.
    compute = call.dtype
    master = weight.dtype == torch.float32 and compute in (torch.bfloat16, torch.float16) and compute != x.dtype
    return "" if weight.dtype == compute or master else f"x is computed in {compute}, weights are {weight.dtype}"


def a_weight(layer) -> Tensor:
    """One of plain experts' weights, which all have its dtype and device."""
    return next(iter(layer.routed_experts._modules.values()))._modules["gate"].weight


def expert_weights(experts: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The experts' own gate, up and down weights. Plain dict look-ups: attribute access on modules is far slower."""
    parts: list[dict[str, Any]] = [expert._modules for expert in experts]
    gate, up, down = ([part[name]._parameters["weight"] for part in parts] for name in ("gate", "up", "down"))
    return gate, up, down


def _weights(layer) -> str:
    """Why the op takes no weights like these; empty when it does."""
    weight = a_weight(layer)
    if weight.dtype not in DTYPES or (weight.dtype == torch.float64 and weight.device.type != "cpu"):
        return f"weights of {weight.dtype}"
    return ""


def _only_used(expert_idx: Tensor, load: Tensor, experts: list[nn.Module]) -> tuple[Tensor, list[nn.Module]]:
    """The experts that have tokens, and the indices among them: autograd gives no gradient to what it does not see."""
    used = load > 0
    place = used.cumsum(0) - 1
    return place[expert_idx], [expert for expert, has_tokens in zip(experts, used.tolist()) if has_tokens]
