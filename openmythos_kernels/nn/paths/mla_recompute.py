"""Training attention from its latents alone: the backward computes queries, keys, values and output again."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor, nn

from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.guards import global_hooks, obstacle
from openmythos_kernels.nn.paths import mla_attention as per_head
from openmythos_kernels.nn.thresholds import threshold
from openmythos_kernels.ops.derivatives import gradients_of, uncast
from openmythos_kernels.ops.mla.attention import bounds, mla_attention, mla_attention_backward
from openmythos_kernels.runtime.backends import Choice

WHEN = "training without a cache, a causal mask or none, no dropout, a call large enough that memory counts"


def choice(layer) -> Choice:
    if reason := _replaced(layer):
        return Choice("reference", reason)
    return per_head.choice(layer)


def refuses(call: LayerCall) -> str:
    layer, x = call.module, call.x
    if not call.grad or call.kv_cache is not None:
        return "no gradients, or a cache"
    # Compilers and checkpointing decide by themselves what to keep, and transforms see every part.
    if call.compiling or call.packs_saved or call.transformed:
        return "a compiler, checkpointing or a transform"
    if is_small(call, x.shape[0] * x.shape[1]):
        return "a call too small to save memory in"
    return _replaced(layer) or per_head.refuses(call)


def is_small(call: LayerCall, rows: int) -> bool:
    """Whether so many rows' queries, keys, values and output are kept rather than computed again."""
    layer = call.module
    numbers = layer.n_heads * (2 * layer.qk_nope_dim + layer.qk_rope_dim + 2 * layer.v_dim)
    return rows * numbers * call.dtype.itemsize < threshold("mla_recompute")


def run(call: LayerCall) -> Tensor:
    layer = call.module
    return MLARecompute.apply(layer, *per_head.begun(call), *per_head.head_weights(layer), layer.wo.weight)


def _replaced(layer) -> str:
    """Why the projections must not run twice; empty when they may."""
    if not layer.recompute:
        return "recompute is switched off"
    reason = global_hooks()  # hooks would see the parts run twice
    for name in (*per_head.UP, "wo"):
        reason = reason or obstacle(name, layer._modules[name], nn.Linear)
    return reason


class MLARecompute(torch.autograd.Function):
    """An MLAttention from what `q_down` and `kv_down` made to its result, keeping these two and the log-sum-exp.

    `forward(layer, c_q, c_kv, phasors, start, *head_weights(layer), wo)`. The backward goes by these weights, not
    by what the layer has then (`functional_call` lends it others for one forward), and by the autocast of the forward,
    whatever is on by then. Its kernel makes the output from the same softmax weights as the gradients, so that no
    second forward runs; only a graph of the gradients needs one.
    """

    @staticmethod
    def forward(ctx, layer, c_q, c_kv, phasors, start, *weights):
        *own, wo = weights
        inputs = per_head.heads(layer, c_q, c_kv, phasors, weights=own)
        ctx.bounds = bounds(inputs[0], inputs[3], start, None)
        out, lse = mla_attention(*inputs, *ctx.bounds)
        ctx.layer, ctx.autocast = layer, autocast(c_q.device.type)
        ctx.save_for_backward(c_q, c_kv, phasors, lse, *weights)
        return per_head.project(layer, "wo", out.flatten(2), wo)

    @staticmethod
    @uncast
    def backward(ctx, dy):
        c_q, c_kv, phasors, lse, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = partial(_whole, ctx.layer, phasors, ctx.bounds)
            with ctx.autocast():
                dc_q, dc_kv, *dweights = gradients_of(again, (c_q, c_kv, *weights), (dy,))
            return None, dc_q, dc_kv, None, None, *dweights
        *own, wo = weights
        leaves = [x.detach().requires_grad_() for x in (c_q, c_kv)]
        own = [w.detach().requires_grad_(w.requires_grad) for w in own]
        with torch.enable_grad(), ctx.autocast():
            inputs = per_head.heads(ctx.layer, leaves[0], leaves[1], phasors, weights=own)
        rows = dy.flatten(0, -2)
        dout = (rows @ wo.to(rows.dtype)).view(*inputs[0].shape[:3], ctx.layer.v_dim)
        *dinputs, out = mla_attention_backward(dout, *(x.detach() for x in inputs), *ctx.bounds, None, lse)
        dwo = rows.t() @ out.flatten(2).flatten(0, 1) if ctx.needs_input_grad[-1] else None
        dc_q, dc_kv, *found = torch.autograd.grad(inputs, [*leaves, *(w for w in own if w.requires_grad)], dinputs)
        rest = iter(found)
        return None, dc_q, dc_kv, None, None, *(next(rest) if w.requires_grad else None for w in own), dwo


def _whole(
    layer, phasors: Tensor, limits: tuple[Tensor, Tensor], c_q: Tensor, c_kv: Tensor, *weights: Tensor
) -> tuple[Tensor]:
    """The forward by differentiable ops."""
    *own, wo = weights
    inputs = per_head.heads(layer, c_q, c_kv, phasors, weights=own)
    return (per_head.project(layer, "wo", mla_attention(*inputs, *limits)[0].flatten(2), wo),)


def autocast(device: str):
    """A function that brings the present autocast back; what it casts is not kept, as it is needed once."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext  # the backward has none of its own
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), cache_enabled=False)
