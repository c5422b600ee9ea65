"""Attention of the running positions alone, in a loop whose halted positions freeze."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.dropout import drops
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.packed import PackedKeys
from openmythos_kernels.nn.paths import mla_attention as per_head
from openmythos_kernels.ops import mla
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
    if kernels and not per_head.dtypes(call, choose("mla_attention", call.device).backend):
        c_q, c_kv = (per_head.project(layer, down, x) for down in ("q_down", "kv_down"))
        phasors = torch.view_as_real(call.freqs_cis)
        q_norm, kv_norm = layer.q_norm.weight, layer.kv_norm.weight
        q_nope, q_rope = per_head.queries(layer, c_q, phasors, q_norm, None, None)
        latent, k_rope = per_head.norm_rope(c_kv, phasors, kv_norm, layer.kv_norm.eps)
    else:
        q_nope, q_rope = layer.query(x, call.freqs_cis).split((layer.qk_nope_dim, layer.qk_rope_dim), -1)
        latent, k_rope = layer.latent(x, call.freqs_cis)
    kv, k_rope = _seen(layer, keys, name, latent[0], k_rope[0])
    out = mla.attention_rows(q_nope[0], q_rope[0], kv, k_rope, keys.position, keys.offset)[0]
    return per_head.project(layer, "wo", out.flatten(1).unsqueeze(0))


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
