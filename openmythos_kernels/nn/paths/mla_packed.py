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


def obstacle(layer, dtype: torch.dtype) -> str:
    """Why a layer's attention cannot be computed for some positions alone, from x of this dtype; empty when it can."""
    if drops(layer._modules["attn_drop"]):
        return "dropout"
    return per_head.choice(layer).reason if not per_head.choice(layer).fast else ""


def run(call: LayerCall) -> Tensor:
    layer, keys = call.module, call.mask
    name = keys.layer(call.cache_key)
    if (held := keys.held(name)) is not None:
        at, old = held
        keys.write(name, at, _expanded(layer, old["latent"]), old["k_rope"])
    q_nope, q_rope, kv, k_rope = _projected(call, keys, name)
    buffers = keys.write(name, None, kv, k_rope)
    out = mla.attention_rows(q_nope, q_rope, *buffers, keys.position, keys.offset)[0]
    return per_head.project(layer, "wo", out.flatten(1).unsqueeze(0))


def _projected(call: LayerCall, keys: PackedKeys, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_nope, q_rope, kv and k_rope of the rows, (N, ...) each."""
    layer, x = call.module, call.x
    entry = _Noted(keys, name)
    backend = choose("mla_attention", call.device).backend
    if call.narrow and call.dtype in KERNEL_FLOATS and not per_head.dtypes(call, backend):
        phasors = torch.view_as_real(call.freqs_cis)
        c_q, c_kv = (per_head.project(layer, down, x) for down in ("q_down", "kv_down"))
        made = per_head.heads(layer, c_q, c_kv, phasors, entry)
    else:
        q_nope, q_rope = layer.query(x, call.freqs_cis).split((layer.qk_nope_dim, layer.qk_rope_dim), -1)
        latent, k_rope = entry.append(**dict(zip(("latent", "k_rope"), layer.latent(x, call.freqs_cis))))
        made = q_nope, q_rope, _expanded(layer, latent[0]).unsqueeze(0), k_rope
    q_nope, q_rope, kv, k_rope = (y.squeeze(0) for y in made)
    return q_nope, q_rope, kv, k_rope


def _expanded(layer, latent: Tensor) -> Tensor:
    """Keys and values per head, (n, H, nope + v), of latents (n, r)."""
    kv = per_head.project(layer, "kv_up", latent.unsqueeze(0))[0]
    return kv.unflatten(-1, (layer.n_heads, layer.qk_nope_dim + layer.v_dim))


class _Noted:
    """A cache entry that notes what the rows make and hands it back."""

    def __init__(self, keys: PackedKeys, name: str):
        self._keys, self._name = keys, name

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        self._keys.note(self._name, **{name: x[0] for name, x in new.items()})
        return tuple(new.values())
