"""Experts that a loop calls several times in one training forward: their weights' gradients are summed in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import openmythos
from openmythos import compat
from openmythos_kernels.nn.call import Call, LoopCall, dtype_of
from openmythos_kernels.nn.guards import global_hooks, has_hooks, is_fast
from openmythos_kernels.nn.paths import moe_experts
from openmythos_kernels.nn.paths.moe_experts import a_weight, expert_weights
from openmythos_kernels.nn.thresholds import threshold
from openmythos_kernels.ops.moe import RepeatedExperts
from openmythos_kernels.runtime.backends import Choice, forced

WHEN = "training within a recurrent block"

# By the layer's id.
_repeated: ContextVar[Mapping[int, RepeatedExperts]] = ContextVar("repeated", default=MappingProxyType({}))


def choice(layer) -> Choice:
    if layer.idle_experts != "zeros":
        return Choice("reference", 'idle_experts="none"')
    return moe_experts.choice(layer)


def refuses(call: Call) -> str:
    if not call.grad or call.compiling:
        return "no gradients, or torch.compile"
    if call.packs_saved:
        return "checkpointing, which runs each call for itself"
    if call.module.exchange is not None:
        return moe_experts.DIVIDED
    held = held_by(call.module)
    if held is None or held.dtype not in (call.dtype, torch.float32):
        return "one call, or another dtype than that of the forward"
    return moe_experts.dtypes(call)  # the experts were judged when `held` was made


def run(call: Call) -> Tensor:
    x, held = call.x, held_by(call.module)
    flat, expert_idx, topk_weights, _ = moe_experts.routed(call)
    return held(flat, expert_idx, topk_weights).to(x.dtype).view_as(x)


def held_by(layer) -> Any:
    """A layer's experts, for the calls of this forward; None outside of one. The routed ones alone if they are divided
    over ranks."""
    return _repeated.get().get(id(layer))


@contextlib.contextmanager
def summing_in_place(call: LoopCall) -> Iterator[None]:
    """Within, all calls of a MoEFFN in the looped block sum the gradients of its weights in place."""
    core: nn.Module = call.module.block
    sums = call.grad and not call.transformed and not forced()
    layers = [m for m in core.modules() if is_fast(m, openmythos.MoEFFN)] if sums else []
    # Hooks may bring other parameters for every call, as FSDP does.
    watched = layers and (global_hooks() or any(has_hooks(m) or compat.FSDP_PART in m._modules for m in core.modules()))
    if watched:
        layers = []
    held = {id(layer): _experts(layer) for layer in layers if _sums(layer)}
    token = _repeated.set({**_repeated.get(), **held})
    try:
        yield
    finally:
        _repeated.reset(token)


def _sums(layer) -> bool:
    routed = layer.routed_experts._modules.values()
    return choice(layer).fast if layer.exchange is None else moe_experts.over(layer, routed).fast


def _experts(layer) -> RepeatedExperts:
    """A layer's experts, for several calls of one forward; on a GPU autocast's rounding is done here, once."""
    parts = layer.routed_experts._modules.values(), layer.shared_experts._modules.values()
    weight = a_weight(layer)
    dtype = dtype_of(weight) if weight.is_cuda and weight.dtype == torch.float32 else None
    if layer.exchange is not None:
        parts = parts[0], ()  # type: ignore[assignment]
    lists = [weights for part in parts for weights in expert_weights(part)]
    if weight.is_cuda:
        return RepeatedExperts(lists, dtype, threshold("moe_weights_once"))
    # Rows have the tokens' dtype: where autocast rounds these, a loop's own product of float32 rows is more exact.
    once = threshold("moe_weights_once_cpu") if dtype_of(weight) == weight.dtype else 0
    return RepeatedExperts(lists, dtype, once, threshold("moe_few_tokens"))
