"""The reference's projections with PyTorch's fused attention: no (T, S) scores in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.attention import CausalMask, attend
from openmythos.dropout import drops
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.guards import global_hooks, kind_of, obstacle, own_methods
from openmythos_kernels.ops.derivatives import gradients_of, uncast
from openmythos_kernels.ops.flat import any_requires_grad
from openmythos_kernels.runtime.backends import Choice

WHEN = "a causal mask or none, no dropout; projections are called, so hooks and adapters on them work"


def choice(layer) -> Choice:
    reason = global_hooks() or own_methods("this layer", layer, kind_of(layer), called=True)
    reason = reason or obstacle("attn_drop", layer._modules["attn_drop"], nn.Dropout)
    return Choice("reference", reason) if reason else Choice("pytorch")


def refuses(call: LayerCall) -> str:
    if isinstance(call.causal, Tensor):
        return "the mask is a tensor that is not known to be causal"
    if call.transformed:
        return "a transform, which PyTorch's fused attention is not made for"
    if drops(call.module._modules["attn_drop"]):
        return "dropout"
    return choice(call.module).reason


def run(call: LayerCall) -> Tensor:
    layer = call.module
    mask: Any = call.causal  # no tensor: see `refuses`
    q, k, v = layer.projected(call.x, call.freqs_cis, call.entry)
    if not q.dtype == k.dtype == v.dtype:  # parts of several dtypes
        return layer.wo(layer.attend(q, k, v, mask))
    graded = not call.compiling and call.grad and any_requires_grad((q, k, v)) and not call.packs_saved
    return layer.wo(FusedAttend.apply(q, k, v, mask) if graded else fused(q, k, v, mask))


def fused(q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | None) -> Tensor:
    """`openmythos.attention.attend` without dropout."""
    dtype, width, v_dim = q.dtype, q.shape[-1], v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden, square = None, False
    if mask is not None and not mask.sees_all:
        square = mask.start == 0 and q.shape[2] == k.shape[2]
        hidden = None if square else mask.additive(k.shape[2], q)
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        # The fused CPU kernel wants one width for queries, keys and values; without it PyTorch takes an unfused path.
        q, k, v = (F.pad(x, (0, max(width, v_dim) - x.shape[-1])) for x in (q, k, v))
    if on_cpu and torch.is_grad_enabled() and dtype in (torch.bfloat16, torch.float16):
        # Its backward is several times slower in low precision than in float32, casts included.
        q, k, v = q.float(), k.float(), v.float()
        hidden = None if hidden is None else hidden.float()
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q, k, v, hidden, is_causal=square, scale=width**-0.5)
    return out[..., :v_dim].transpose(1, 2).flatten(2).to(dtype)


class FusedAttend(torch.autograd.Function):
    """`forward(q, k, v, mask)` is `fused(q, k, v, mask)`, with gradients that have gradients.

    PyTorch's fused attention has none of second order: where a graph of the gradients is asked for, they come from the
    reference's attention.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask | None) -> Tensor:
        ctx.mask = mask
        ctx.save_for_backward(q, k, v)
        ctx.run = _run(ctx, (q, k, v))
        return ctx.run[1].detach()

    @staticmethod
    @uncast
    def backward(ctx, dout: Tensor):
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_of(lambda q, k, v: (attend(q, k, v, ctx.mask, lambda w: w),), inputs, (dout,)), None
        # A retained graph may be asked again, but is not worth the memory of what fused attention saves.
        leaves, out = ctx.run or _run(ctx, inputs)
        ctx.run = None
        return *torch.autograd.grad(out, leaves, dout), None


def _run(ctx, inputs) -> tuple[list[Tensor], Tensor]:
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return leaves, fused(q, k, v, ctx.mask)
