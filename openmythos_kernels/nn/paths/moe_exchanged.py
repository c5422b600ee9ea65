"""Experts divided over ranks (`openmythos.parallel`): ops route, and compute what arrives from all ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from openmythos import compat
from openmythos_kernels.nn.call import Call
from openmythos_kernels.nn.paths import dense_ffn, moe_experts, moe_repeated
from openmythos_kernels.nn.paths.moe_experts import a_weight, expert_weights
from openmythos_kernels.ops.moe import moe_experts as experts_op
from openmythos_kernels.runtime.backends import Choice

WHEN = "experts divided over ranks; plain ones, in x's dtype (float32 master weights under autocast too)"


def choice(layer) -> Choice:
    if layer.exchange is None:
        return Choice("reference", "this rank has all experts")
    return moe_experts.over(layer, layer.routed_experts._modules.values())


def refuses(call: Call) -> str:
    if call.module.exchange is None:
        return "this rank has all experts"
    if not call.runs_now:
        return "torch.compile, a transform or fake tensors"
    if not (found := choice(call.module)).fast:
        return found.reason
    weight = a_weight(call.module)
    return "" if _fits(weight, call.x, call.dtype) else f"x is computed in {call.dtype}, weights are {weight.dtype}"


def run(call: Call) -> Tensor:
    layer, x = call.module, call.x
    flat, expert_idx, topk_weights, _ = moe_experts.routed(call)
    y = layer.exchange(layer.routed, flat, expert_idx, topk_weights)
    for expert in layer.shared_experts._modules.values():
        y = y + dense_ffn.apply(expert, x.reshape(flat.shape), call.dtype)
    return y.to(x.dtype).view_as(x)


def experts(layer, rows: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """A function (rows, expert_idx, topk_weights) -> weighted sums over this rank's routed experts; None if no op may
    stand in for them."""
    if layer.exchange is None or not choice(layer).fast:
        return None
    if not _fits(a_weight(layer), rows, rows.dtype):
        return None
    held = moe_repeated.held_by(layer)
    # Under checkpointing the backward runs a call again, for itself.
    several = torch.is_grad_enabled() and not compat.saved_tensors_are_hooked()
    if held is not None and several and held.dtype in (rows.dtype, torch.float32):
        return held
    return partial(_op, layer)


def _fits(weight: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the op computes x in this dtype with weights like this one."""
    master = weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return weight.device == x.device and (weight.dtype == dtype or master)


def _op(layer, rows: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> Tensor:
    return experts_op(rows, expert_idx, topk_weights, *expert_weights(layer.routed_experts._modules.values()))
