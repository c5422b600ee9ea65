"""Training attention of the running positions from their latents alone.

What a loop keeps for the backward are c_q and c_kv of its rows; `packed_walk` has the rest of the way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.packed import PackedKeys
from openmythos_kernels.nn.packed_walk import Walk
from openmythos_kernels.nn.paths import mla_attention as per_head
from openmythos_kernels.nn.paths import mla_recompute
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.derivatives import uncast
from openmythos_kernels.runtime.backends import Choice

WHEN = "training inside the path packed_rows, every projection plain, a forward large enough that memory counts"


def choice(layer) -> Choice:
    return mla_recompute.choice(layer)


def refuses(call: LayerCall) -> str:
    keys = call.mask
    if not (isinstance(keys, PackedKeys) and keys.graded):
        return "not in packed_rows, or no gradients"
    if mla_recompute.is_small(call, keys.batch * keys.tokens):
        return "a forward too small to save memory in"
    # Compilers and checkpointing decide by themselves what to keep.
    if call.compiling or call.packs_saved or not call.narrow:
        return "a compiler, checkpointing, or rotary angles that are not complex64"
    # All loops of a forward hand their keys on to each other, so those without gradients take this path, too.
    backend = "cpu" if call.device == "cpu" else "triton"
    if call.dtype != torch.float64 and (reason := per_head.dtypes(call, backend, keys.graded)):
        return reason
    return mla_recompute.choice(call.module).reason


def run(call: LayerCall) -> Tensor:
    layer, keys, x = call.module, call.mask, call.x
    walk = Walk.of(keys, keys.layer(call.cache_key), PackedRecompute)
    c_q, c_kv = (per_head.project(layer, down, x)[0] for down in ("q_down", "kv_down"))
    weights = *per_head.head_weights(layer), layer.wo.weight
    phasors = torch.view_as_real(call.freqs_cis)[0]
    y, *walk.carriers = PackedRecompute.apply(layer, walk, keys, phasors, *walk.carriers, c_q, c_kv, *weights)
    return y[None]


class PackedRecompute(torch.autograd.Function):
    """The attention layer of one loop's rows, from what `q_down` and `kv_down` made of them to its result.

    `forward(layer, walk, keys, phasors, *carriers, c_q, c_kv, *head_weights(layer), wo)` -> (y, *carriers). All but the
    weights have rows as their first dimension.
    """

    @staticmethod
    def forward(ctx, layer, walk: Walk, keys: PackedKeys, phasors, kv_carrier, rope_carrier, c_q, c_kv, *weights):
        q_norm, kv_norm, nope, rope, up, wo = weights
        kv, k_rope = _keys_of(layer, kv_norm, up, phasors, c_kv)
        q_nope, q_rope = per_head.queries(layer, c_q[None], phasors[None], q_norm, nope, rope)
        at = keys.written
        seen = walk.buffers.put(at, keys.writing(kv), keys.writing(k_rope), len(walk.made))
        walk.made.append((at, phasors, c_kv))
        out = mla.attention_rows(q_nope[0], q_rope[0], *seen, keys.position, keys.offset)[0]
        ctx.layer, ctx.buffers, ctx.autocast = layer, walk.buffers, mla_recompute.autocast(c_q.device.type)
        ctx.phasors, ctx.writes, ctx.rows = phasors, keys.running, (keys.position, keys.offset)
        ctx.places = [(at, phasors) for at, phasors, _ in walk.made]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c_q, c_kv, *weights, *(c_kv for _, _, c_kv in walk.made[:-1]))
        return per_head.project(layer, "wo", out.flatten(1), wo), *walk.buffers.carry((kv, k_rope))

    @staticmethod
    @uncast
    def backward(ctx, dy, *later):
        c_q, c_kv, *saved = ctx.saved_tensors
        weights, earlier = saved[:6], saved[6:]
        graph = torch.is_grad_enabled()
        layer, buffers = ctx.layer, ctx.buffers
        if dy is None and all(x is None for x in later):
            return (None,) * 14
        leaf: Any = (lambda x: x.view_as(x)) if graph else (lambda x: x.detach().requires_grad_())
        with torch.enable_grad(), ctx.autocast():
            own_q, own_kv = leaf(c_q), leaf(c_kv)
            q_norm, kv_norm, nope, rope, up, wo = [leaf(w) for w in weights]
            kv, k_rope = _keys_of(layer, kv_norm, up, ctx.phasors, own_kv)
            keys_of = partial(_keys_of, layer, kv_norm, up)
            made = [(*place, x) for place, x in zip(ctx.places, [*earlier, c_kv])]
            own = [x if ctx.writes is None else x[ctx.writes] for x in (kv, k_rope)]
            with torch.set_grad_enabled(graph):
                found = (buffers.differentiable if graph else buffers.back)(made, *own, keys_of)
            seen = [leaf(x) for x in found]
            q_nope, q_rope = per_head.queries(layer, own_q[None], ctx.phasors[None], q_norm, nope, rope)
            out = mla.attention_rows(q_nope[0], q_rope[0], seen[0], seen[1], *ctx.rows)[0]
            y = per_head.project(layer, "wo", out.flatten(1), wo)
        find = partial(torch.autograd.grad, create_graph=graph, allow_unused=True)
        dseen: list[Any]
        if dy is None:
            dc_q = dq_norm = dnope = drope = dwo = None
            dseen = [None, None]
        else:
            dc_q, dq_norm, dnope, drope, dwo, *dseen = find(y, [own_q, q_norm, nope, rope, wo, *seen], dy)
        rows, others = buffers.leave(made[-1][0], dseen, later, own)
        dc_kv, dkv_norm, dup = find(own, [own_kv, kv_norm, up], rows)
        wanted = ctx.needs_input_grad[4:6]
        carried = [total if want else None for total, want in zip(others, wanted)]
        if not any(wanted):  # what loops without gradients made, kv_up has expanded for this loop and later ones
            for earlier_at, phasors, x in buffers.owned(made[:-1]):
                with torch.enable_grad(), ctx.autocast():
                    frozen = _keys_of(layer, kv_norm.detach(), up, phasors, x.detach())[0]
                (more,) = find(frozen, up, others[0].index_select(0, earlier_at))
                dup = dup + more
            buffers.drop()
        return None, None, None, None, *carried, dc_q, dc_kv, dq_norm, dkv_norm, dnope, drope, dup, dwo


def _keys_of(layer, norm: Tensor, up: Tensor, phasors: Tensor, c_kv: Tensor) -> tuple[Tensor, Tensor]:
    """kv and k_rope of what `kv_down` made of some rows, (n, ...)."""
    kv, k_rope = per_head.keys(layer, c_kv[None], phasors[None], norm, up)
    return kv[0], k_rope[0]
