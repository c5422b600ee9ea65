"""Prompts without gradients: a block's attention, and its dense feed-forward layer, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.attention import CausalMask, Mask
from openmythos_kernels.nn.paths.decode_block import attends_whole, runs_at_once
from openmythos_kernels.ops.layer import block_prompt


def through_prompt(block, x: Tensor, freqs_cis: Tensor, mask: Mask) -> Tensor | None:
    """A fast TransformerBlock's output for x (B, T, dim) without a cache, or None where the op must not stand in."""
    if (
        x.shape[1] == 1
        or x.dtype != torch.float32
        or freqs_cis.dtype != torch.complex64
        or not runs_at_once(x, "block_prompt")
    ):
        return None
    if mask is not None and not (type(mask) is CausalMask and mask.start == 0):
        return None
    if not attends_whole(block, x.dtype):
        return None
    parts = block._modules
    before, attn, behind, ffn = (parts[name] for name in ("attn_norm", "attn", "ffn_norm", "ffn"))
    weights, sizes = attn.token_weights()
    dense = not block.dense_obstacle(x.dtype)
    phasors = torch.view_as_real(freqs_cis)
    y, normed = block_prompt(
        x,
        phasors if phasors.dim() == 4 else phasors.unsqueeze(0),
        [before.weight, *weights.values(), behind.weight],
        [ffn._modules[name]._parameters["weight"] for name in ("gate", "up", "down")] if dense else [],
        **sizes,
        eps=[before.eps, attn.q_norm.eps, behind.eps],
        causal=mask is not None,
    )
    return y if dense else y + ffn(normed)
