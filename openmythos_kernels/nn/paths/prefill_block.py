"""Prompts without gradients: a block's attention, and its dense feed-forward layer, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.attention import CausalMask
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.paths import dense_ffn, mla_decode
from openmythos_kernels.nn.paths.decode_block import attention_obstacle, not_now
from openmythos_kernels.ops.layer import AttentionWeights, Eps, block_prompt
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "several float32 tokens without a cache, no gradients, on a CPU; a causal mask or none"


def choice(block) -> Choice:
    if reason := attention_obstacle(block, torch.float32):
        return Choice("reference", reason)
    return choose("block_prompt", block._modules["attn_norm"].weight.device.type)


def refuses(call: LayerCall) -> str:
    x = call.x
    if x.shape[1] == 1 or call.kv_cache is not None:
        return "a single token, or a cache"
    if x.dtype != torch.float32 or not call.narrow:
        return f"x is {x.dtype}, rotary angles {call.freqs_cis.dtype}: must be float32 and complex64"
    if reason := not_now(call, "block_prompt"):
        return reason
    mask = call.causal
    if mask is not None and not (type(mask) is CausalMask and mask.start == 0):
        return "the mask is not causal from the first token on"
    return attention_obstacle(call.module, x.dtype)


def run(call: LayerCall) -> Tensor:
    x, parts = call.x, call.module._modules
    before, attn, behind, ffn = (parts[name] for name in ("attn_norm", "attn", "ffn_norm", "ffn"))
    weights, sizes = mla_decode.weights(attn)
    dense = not dense_ffn.ffn_obstacle(ffn, x.dtype)
    phasors = torch.view_as_real(call.freqs_cis)
    y, normed = block_prompt(
        x,
        phasors if phasors.dim() == 4 else phasors.unsqueeze(0),
        AttentionWeights(attn_norm=before.weight, **weights, ffn_norm=behind.weight),
        dense_ffn.weights(ffn) if dense else [],
        **sizes,
        eps=Eps(attn_norm=before.eps, latent_norms=attn.q_norm.eps, ffn_norm=behind.eps),
        causal=call.causal is not None,
    )
    return y if dense else y + ffn(normed)
