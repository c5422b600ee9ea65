"""Prompts and training: latent attention per head by `mla.attention`, on keys as the projections leave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos.dropout import drops
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.call import LayerCall, dtype_of
from openmythos_kernels.nn.guards import global_hooks, kind_of, obstacle, own_methods
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "several tokens, a causal mask or none, no dropout; float32 on a CPU (16 bits to train), 16 bits on a GPU"
NORMS, UP = ("q_norm", "kv_norm"), ("q_up_nope", "q_up_rope", "kv_up")


def choice(layer) -> Choice:
    if reason := _replaced(layer):
        return Choice("reference", reason)
    return choose("mla_attention", layer._modules["kv_norm"].weight.device.type)


def refuses(call: LayerCall) -> str:
    layer, found = call.module, choose("mla_attention", call.device)
    if call.x.shape[1] == 1:
        return "a single token"
    if not call.narrow:
        return "rotary angles are not complex64"
    if not found.fast:
        return found.reason
    if isinstance(call.causal, Tensor):
        return "the mask is a tensor that is not known to be causal"
    if drops(layer._modules["attn_drop"]):
        return "dropout"
    return _replaced(layer) or dtypes(call, found.backend)


def run(call: LayerCall) -> Tensor:
    layer = call.module
    c_q, c_kv, phasors, start = begun(call)
    inputs = heads(layer, c_q, c_kv, phasors, call.entry)
    return project(layer, "wo", mla.attention(*inputs, start)[0].flatten(2))


def begun(call: LayerCall) -> tuple[Tensor, Tensor, Tensor, int | Tensor | None]:
    """What `q_down` and `kv_down` make of x, phasors (B or 1, T, rope / 2, 2), and the first query's place."""
    layer, x = call.module, call.x
    mask: Any = call.causal  # no tensor: see `refuses`
    phasors = torch.view_as_real(call.freqs_cis)
    phasors = phasors if phasors.dim() == 4 else phasors.unsqueeze(0)
    start = mask if mask is None else mask.start
    if start is not None and not isinstance(start, int):
        start = torch.as_tensor(start, dtype=torch.int64, device=x.device)
    return project(layer, "q_down", x), project(layer, "kv_down", x), phasors, start


def project(layer, name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What the projection of this name makes of x; with `weight`, what a plain one of this weight would."""
    part = layer._modules[name]
    if weight is None:
        if global_hooks() or obstacle(name, part, nn.Linear):
            return part(x)
        weight = part.weight
    fast = x.dtype == weight.dtype == dtype_of(x) == torch.float32
    fast = fast and choose("mla_linear", x.device.type).fast
    return mla.linear(x, weight) if fast else F.linear(x, weight)


def head_weights(layer) -> list[Tensor]:
    """The weights of `heads`."""
    return [layer._modules[name].weight for name in (*NORMS, *UP)]


def heads(
    layer, c_q: Tensor, c_kv: Tensor, phasors: Tensor, entry: Any = None, weights: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `mla.attention` takes of what `q_down` and `kv_down` made.

    Args:
        weights: as of `head_weights`, where every projection is plain; None calls the layer's parts.
    """
    own: Any = weights or [layer.q_norm.weight, layer.kv_norm.weight, None, None, None]
    return *queries(layer, c_q, phasors, own[0], *own[2:4]), *keys(layer, c_kv, phasors, own[1], own[4], entry)


def queries(
    layer, c_q: Tensor, phasors: Tensor, norm: Tensor, nope: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q_nope and q_rope of what `q_down` made; `norm`, `nope` and `rope` are weights, None those of the parts."""
    c_q = norm_rope(c_q, phasors, norm, layer.q_norm.eps)[0]
    q_nope = project(layer, "q_up_nope", c_q, nope).unflatten(-1, (layer.n_heads, layer.qk_nope_dim))
    q_rope = norm_rope(project(layer, "q_up_rope", c_q, rope), phasors, c_q.new_empty(0), 0.0)[1]
    return q_nope, q_rope.unflatten(-1, (layer.n_heads, layer.qk_rope_dim))


def keys(
    layer, c_kv: Tensor, phasors: Tensor, norm: Tensor, up: Tensor | None, entry: Any = None
) -> tuple[Tensor, Tensor]:
    """kv and k_rope of what `kv_down` made; `norm` and `up` are weights, None that of the part. A cache entry is
    extended, and the keys are then all of its."""
    latent, k_rope = norm_rope(c_kv, phasors, norm, layer.kv_norm.eps)
    if entry is not None:
        latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
    return project(layer, "kv_up", latent, up).unflatten(-1, (layer.n_heads, layer.qk_nope_dim + layer.v_dim)), k_rope


def norm_rope(x: Tensor, phasors: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`mla.norm_rope`, which has no kernel for float64."""
    if x.dtype == torch.float64:
        return formula.norm_rope(x, phasors, weight, eps)
    return mla.norm_rope(x, phasors, weight, eps)


def _replaced(layer) -> str:
    """What would be bypassed by not calling the norms and `attn_drop`; empty if nothing."""
    reason = global_hooks() or own_methods("this layer", layer, kind_of(layer), called=True)
    reason = reason or obstacle("attn_drop", layer._modules["attn_drop"], nn.Dropout)
    for name in NORMS:
        reason = reason or obstacle(name, layer._modules[name], RMSNorm)
    return reason


def dtypes(call: LayerCall, backend: str, trains: bool | None = None) -> str:
    """Why plain norms and this call's dtype are not what the kernel computes as the reference does; `trains` says
    whether there are gradients, if not in this call then in others that must compute alike."""
    parts, dtype = call.module._modules, call.dtype
    if not call.autocast:
        up = parts["kv_up"]
        if not obstacle("kv_up", up, nn.Linear) and up.weight.dtype != dtype:
            return "x and kv_up's weight have different dtypes"
    if any(parts[name].weight.dtype not in (dtype, torch.float32) for name in NORMS):
        return "a norm's weight is of another dtype"
    half = dtype in (torch.bfloat16, torch.float16)
    if backend == "triton":
        # A GPU has no matrix instruction of full float32 precision.
        return "" if half else f"{dtype} on a GPU"
    # PyTorch's kernel uses the processor's 16-bit instructions in low precision, but is slow backwards.
    trains = call.grad if trains is None else trains
    return "" if dtype == torch.float32 or (half and trains) else f"{dtype} on a CPU without gradients"
