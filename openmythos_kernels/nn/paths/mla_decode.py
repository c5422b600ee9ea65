"""Decoding: one token per row through latent attention as one op, against the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmythos.cache import LayerCache
from openmythos.dropout import drops
from openmythos.layers import RMSNorm
from openmythos_kernels.nn import lengths
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.guards import global_hooks, kind_of, obstacle, own_methods
from openmythos_kernels.ops import mla
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "one cached token per row, no gradients, no autocast"
# The parts whose weights the op reads, in its order.
PARTS = {
    "q_down": nn.Linear,
    "q_norm": RMSNorm,
    "q_up_nope": nn.Linear,
    "q_up_rope": nn.Linear,
    "kv_down": nn.Linear,
    "kv_norm": RMSNorm,
    "kv_up": nn.Linear,
    "wo": nn.Linear,
}


def choice(layer) -> Choice:
    if reason := _replaced(layer):
        return Choice("reference", reason)
    found = choose("mla_decode", layer._modules["kv_norm"].weight.device.type)
    reason = _dtypes(layer) if found.fast else ""
    return Choice("reference", reason) if reason else found


def refuses(call: LayerCall) -> str:
    layer = call.module
    if call.x.shape[1] != 1 or call.kv_cache is None:
        return "not one token per row with a cache"
    if call.grad or call.transformed or call.autocast:
        return "gradients, a transform or autocast"
    if not call.narrow:
        return "rotary angles are not complex64"
    if not (found := choice(layer)).fast:
        return found.reason
    if call.x.dtype != layer._modules["kv_norm"].weight.dtype:
        return "x and the weights have different dtypes"
    if drops(layer._modules["attn_drop"]):
        return "dropout"
    return "" if call.a_token_per_row else "the mask does not show each row exactly its cache"


def run(call: LayerCall) -> Tensor:
    layer, x, entry = call.module, call.x, call.entry
    latent, k_rope = room(layer, entry, x)
    held = lengths.on_device(entry.lengths, x.device)
    tensors, sizes = weights(layer)
    eps = layer._modules["q_norm"].eps
    y = mla.decode(x.squeeze(1), phasors_of(call.freqs_cis), latent, k_rope, held, **tensors, **sizes, eps=eps)
    entry.lengths = [n + 1 for n in entry.lengths]
    return y.unsqueeze(1)


def weights(layer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decode ops take of a layer: weights by name, and numbers of heads and channels."""
    parts = layer._modules
    tensors = {name: parts[name]._parameters["weight"] for name in PARTS}
    return tensors, dict(n_heads=layer.n_heads, nope=layer.qk_nope_dim, rope=layer.qk_rope_dim, v=layer.v_dim)


def room(layer, entry: LayerCache, x: Tensor) -> tuple[Tensor, Tensor]:
    """The cache's latents and rotary keys, with room for one more token per row of x (B, ...)."""
    tensors = entry.tensors
    held: Any = tensors.get("latent")
    rope: Any = tensors.get("k_rope")
    new = held is None or held.shape[0] != len(x) or held.dtype != x.dtype or max(entry.lengths) >= held.shape[1]
    if new or not (held.stride(0) and rope.stride(0)):  # stride 0: rows share memory
        widths = {"latent": layer.kv_lora_rank, "k_rope": layer.qk_rope_dim}
        entry.reserve(1, **{name: x.new_empty(len(x), 1, width) for name, width in widths.items()})
        held, rope = tensors["latent"], tensors["k_rope"]
    return held, rope


def phasors_of(freqs_cis: Tensor) -> Tensor:
    """(cos, sin) of one token per row, (B or 1, rope / 2, 2)."""
    phasors = torch.view_as_real(freqs_cis)
    return phasors if phasors.dim() == 3 else phasors.squeeze(1)


def _replaced(layer) -> str:
    """What the op would bypass by not calling the submodules; empty if nothing."""
    parts = layer._modules
    reason = global_hooks() or own_methods("this layer", layer, kind_of(layer), called=True)
    if reason := reason or obstacle("attn_drop", parts["attn_drop"], nn.Dropout):
        return reason
    for name, kind in PARTS.items():
        if reason := obstacle(name, parts[name], kind):
            return reason
    return ""


def _dtypes(layer) -> str:
    """What the op cannot compute of plain parts; empty if nothing."""
    parts = layer._modules
    dtype = parts["kv_norm"].weight.dtype
    if dtype not in mla.DTYPES:
        return f"weights of {dtype}"
    if dtype == torch.float64 and parts["kv_norm"].weight.device.type != "cpu":
        return "weights of float64 on a GPU"
    for name in PARTS:
        if parts[name]._parameters["weight"].dtype != dtype:
            return f"{name}'s weight is of another dtype than the others"
    if parts["q_norm"].eps != parts["kv_norm"].eps:
        return "q_norm and kv_norm have different eps"
    return ""
