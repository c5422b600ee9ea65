"""A block's norms as ops, with the residual addition before the second; its attention and FFN are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmythos.dropout import drops
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.guards import global_hooks, obstacle
from openmythos_kernels.nn.paths import dense_ffn
from openmythos_kernels.ops.norm import DTYPES, add_rms_norm, rms_norm
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "x in the dtype of the norms' weights, no dropout"


def choice(block) -> Choice:
    if reason := _replaced(block):
        return Choice("reference", reason)
    device = block._modules["attn_norm"].weight.device.type
    found, dtype = choose("rms_norm", device), dtype_of_norms(block)
    if not found.fast:
        return found
    if dtype not in DTYPES:
        return Choice("reference", f"weights of {dtype}")
    if dtype == torch.float64 and device != "cpu":
        return Choice("reference", "weights of float64 on a GPU")
    return found


def refuses(call: LayerCall) -> str:
    block = call.module
    if not (found := choice(block)).fast:
        return found.reason
    if call.x.dtype != dtype_of_norms(block):
        return "x and the norms' weights have different dtypes"
    return "dropout" if drops(block._modules["resid_drop"]) else ""


def run(call: LayerCall) -> Tensor:
    parts, x = call.module._modules, call.x
    before, behind = parts["attn_norm"], parts["ffn_norm"]
    normed = rms_norm(x, before.weight, before.eps)
    attended = parts["attn"](normed, call.freqs_cis, call.mask, call.kv_cache, call.cache_key)
    # Under autocast the attention may come out in low precision; the addition widens it, as in the reference.
    x, normed = add_rms_norm(x, attended.to(x.dtype), behind.weight, behind.eps)
    return x + dense_ffn.apply(parts["ffn"], normed, call.dtype)


def dtype_of_norms(block) -> torch.dtype | None:
    """None where the first norm has no weight of its own."""
    weight = block._modules["attn_norm"]._parameters.get("weight")
    return None if weight is None else weight.dtype


def _replaced(block) -> str:
    """What the ops would bypass by not calling the submodules; empty if nothing."""
    parts = block._modules
    reason = global_hooks() or obstacle("resid_drop", parts["resid_drop"], nn.Dropout)
    reason = reason or obstacle("attn_norm", parts["attn_norm"], RMSNorm)
    return reason or obstacle("ffn_norm", parts["ffn_norm"], RMSNorm)
