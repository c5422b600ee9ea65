"""Attention of the running positions alone, in a loop whose halted positions freeze.

Training keeps queries, keys, values and output of the rows that ran, and nothing of the others; where that is much,
`mla_packed_recompute` comes before this path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.dropout import drops
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.packed import PackedKeys
from openmythos_kernels.nn.packed_walk import Walk
from openmythos_kernels.nn.paths import mla_attention as per_head
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.derivatives import uncast
from openmythos_kernels.ops.dtypes import KERNEL_FLOATS
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "inside the path packed_rows of a recurrent block"


def choice(layer) -> Choice:
    return per_head.choice(layer)


def refuses(call: LayerCall) -> str:
    # What else stands in the way is asked once a forward: `obstacle` below.
    return "" if isinstance(call.mask, PackedKeys) else "not in packed_rows"


def obstacle(layer) -> str:
    """Why a layer's attention cannot be computed for some positions alone; empty when it can."""
    if drops(layer._modules["attn_drop"]):
        return "dropout"
    found = per_head.choice(layer)
    return "" if found.fast else found.reason


def run(call: LayerCall) -> Tensor:
    layer, keys, x = call.module, call.mask, call.x
    name = keys.layer(call.cache_key)
    kernels = call.narrow and call.dtype in KERNEL_FLOATS
    if kernels and not per_head.dtypes(call, choose("mla_attention", call.device).backend, keys.graded):
        c_q, c_kv = (per_head.project(layer, down, x) for down in ("q_down", "kv_down"))
        phasors = torch.view_as_real(call.freqs_cis)
        q_norm, kv_norm = layer.q_norm.weight, layer.kv_norm.weight
        q_nope, q_rope = per_head.queries(layer, c_q, phasors, q_norm, None, None)
        latent, k_rope = per_head.norm_rope(c_kv, phasors, kv_norm, layer.kv_norm.eps)
    else:
        q_nope, q_rope = layer.query(x, call.freqs_cis).split((layer.qk_nope_dim, layer.qk_rope_dim), -1)
        latent, k_rope = layer.latent(x, call.freqs_cis)
    # Compilers and checkpointing run a loop's forward again, which a walk could not follow.
    if keys.graded and not (call.compiling or call.packs_saved):
        out = _walked(layer, Walk.of(keys, name, PackedAttention), keys, q_nope[0], q_rope[0], latent[0], k_rope[0])
    else:
        kv, k_rope = _seen(layer, keys, name, latent[0], k_rope[0])
        out = mla.attention_rows(q_nope[0], q_rope[0], kv, k_rope, keys.position, keys.offset)[0]
    return per_head.project(layer, "wo", out.flatten(1).unsqueeze(0))


def _walked(layer, walk: Walk, keys: PackedKeys, q_nope: Tensor, q_rope: Tensor, *made: Tensor) -> Tensor:
    """The attention of rows that made these latents and rotary keys, (N, ...)."""
    at, (latent, k_rope) = keys.written, map(keys.writing, made)
    if not torch.is_grad_enabled():
        walk.frozen.append((at, latent, k_rope))
        seen = walk.buffers.put(at, _expanded(layer, latent[None])[0], k_rope, -1)
        return mla.attention_rows(q_nope, q_rope, *seen, keys.position, keys.offset)[0]
    if walk.frozen:  # the first loop with gradients expands what it reads of the others: kv_up's gradient counts there
        at, latent, k_rope = map(torch.cat, zip(*walk.buffers.owned([*walk.frozen, (at, latent, k_rope)])))
        walk.frozen = []
    kv = _expanded(layer, latent[None])[0]
    out, *walk.carriers = PackedAttention.apply(walk, keys, at, *walk.carriers, q_nope, q_rope, kv, k_rope)
    return out


def _seen(layer, keys: PackedKeys, name: str, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """kv (B, S, H, nope + v) and k_rope (B, S, rope) of all tokens in this loop, of which the rows made these."""
    keys.note(name, latent=latent, k_rope=k_rope)
    if keys.graded:
        # Every loop expands the latents of all tokens: gradients of kv_up come from each loop that reads them.
        latents, k_ropes = keys.write(name, None, latent, k_rope)
        return _expanded(layer, latents), k_ropes
    if (held := keys.held(name)) is not None:
        at, old = held
        keys.write(name, at, _expanded(layer, old["latent"].unsqueeze(0))[0], old["k_rope"])
    return keys.write(name, None, _expanded(layer, latent.unsqueeze(0))[0], k_rope)  # type: ignore[return-value]


def _expanded(layer, latent: Tensor) -> Tensor:
    """Keys and values per head, (B, S, H, nope + v), of latents (B, S, r)."""
    return per_head.project(layer, "kv_up", latent).unflatten(-1, (layer.n_heads, layer.qk_nope_dim + layer.v_dim))


class PackedAttention(torch.autograd.Function):
    """`mla.attention_rows` of one loop's rows over the keys of all positions.

    `forward(walk, keys, at, *carriers, q_nope, q_rope, kv, k_rope)` -> (out, *carriers); kv (n, H, nope + v) and k_rope
    (n, rope) are the keys at the places `at`, (n,), which this loop replaces.
    """

    @staticmethod
    def forward(ctx, walk: Walk, keys: PackedKeys, at, kv_carrier, rope_carrier, q_nope, q_rope, kv, k_rope):
        seen = walk.buffers.put(at, kv, k_rope, len(walk.made))
        walk.made.append((at, kv, k_rope))
        out, lse = mla.attention_rows(q_nope, q_rope, *seen, keys.position, keys.offset)
        ctx.buffers, ctx.rows, ctx.places = walk.buffers, (keys.position, keys.offset), [at for at, *_ in walk.made]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_nope, q_rope, out, lse, *(x for _, *kept in walk.made for x in kept))
        return out, *walk.buffers.carry((kv, k_rope))

    @staticmethod
    @uncast
    def backward(ctx, dout, *later):
        if dout is None and all(x is None for x in later):
            return (None,) * 9
        q_nope, q_rope, out, lse, *kept = ctx.saved_tensors
        buffers, made = ctx.buffers, [*zip(ctx.places, kept[::2], kept[1::2])]
        at, *own = made[-1]
        dq_nope = dq_rope = None
        dseen: Any = None, None
        if dout is not None:
            seen = (buffers.differentiable if torch.is_grad_enabled() else buffers.back)(made, *own, _as_kept)
            position, offset = ctx.rows
            found = mla.attention_rows_backward(dout, q_nope, q_rope, seen[0], seen[1], position, offset, out, lse)
            dq_nope, dq_rope, *dseen = found
        rows, others = buffers.leave(at, dseen, later, own)
        wanted = ctx.needs_input_grad[3:5]
        if not any(wanted):
            buffers.drop()
        carried = [total if want else None for total, want in zip(others, wanted)]
        return None, None, None, *carried, dq_nope, dq_rope, *rows


def _as_kept(kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    return kv, k_rope
