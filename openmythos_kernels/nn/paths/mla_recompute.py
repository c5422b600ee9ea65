"""Training attention from its latents alone: queries, keys, values and output are made again in the backward pass."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import gradients_of, uncast
from openmythos_kernels.ops.mla.attention import bounds, mla_attention, mla_attention_backward


class FromLatents(torch.autograd.Function):
    """An MLAttention from what `q_down` and `kv_down` made to its result, keeping these two and the log-sum-exp.

    `forward(layer, c_q, c_kv, phasors, start, *layer.per_head_weights(), wo)`. The backward goes by these weights, not
    by what the layer has then (`functional_call` lends it others for one forward), and by the autocast of the forward,
    whatever is on by then. Its kernel makes the output from the same weights of the softmax as the gradients, so that
    no second forward is run; a graph of the gradients, if one is asked for, needs it.
    """

    @staticmethod
    def forward(ctx, layer, c_q, c_kv, phasors, start, *weights):
        *own, wo = weights
        inputs = layer.per_head(c_q, c_kv, phasors, weights=own)
        ctx.bounds = bounds(inputs[0], inputs[3], start, None)
        out, lse = mla_attention(*inputs, *ctx.bounds)
        ctx.layer, ctx.autocast = layer, _autocast(c_q.device.type)
        ctx.save_for_backward(c_q, c_kv, phasors, lse, *weights)
        return layer.project("wo", out.flatten(2), wo)

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
            inputs = ctx.layer.per_head(*leaves, phasors, weights=own)
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
    inputs = layer.per_head(c_q, c_kv, phasors, weights=own)
    return (layer.project("wo", mla_attention(*inputs, *limits)[0].flatten(2), wo),)


def _autocast(device: str):
    """A function that brings the present autocast back; what it casts is not kept, as it is needed once."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext  # the backward has none of its own
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), cache_enabled=False)
