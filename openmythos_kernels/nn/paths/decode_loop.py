"""Decoding: one token per row through all loops of a recurrent block as one op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmythos.attention import Mask
from openmythos.block import BlockStack
from openmythos.cache import LOOP_KEY, layer_cache
from openmythos.config import setting
from openmythos_kernels.nn.attention import holds, phasors_of
from openmythos_kernels.nn.block import TransformerBlock
from openmythos_kernels.nn.guards import obstacle
from openmythos_kernels.nn.paths.decode_block import is_token, is_whole, note, weights_of
from openmythos_kernels.ops.layer import LoopDecode, loop_decode


def through_loops(
    recurrent, h: Tensor, e: Tensor, freqs_cis: Tensor, mask: Mask, embeddings: Sequence[Tensor], kv_cache: dict
) -> LoopDecode | None:
    """As many loops of a RecurrentBlock with halting="evolve" as there are embeddings, for h (B, 1, dim); None where
    the op must not stand in for its parts."""
    if not is_token(h) or recurrent.watchers or freqs_cis.dtype != torch.complex64:
        return None
    core = recurrent._modules["block"]
    stacked = type(core) is BlockStack and not obstacle("block", core, BlockStack)
    blocks = list(core._modules.values()) if stacked else [core]
    if any(obstacle("block", block, TransformerBlock) or not is_whole(block, h.dtype) for block in blocks):
        return None
    keys = [
        LOOP_KEY.format(t) + (f".{i}" if stacked else "") for t in range(len(embeddings)) for i in range(len(blocks))
    ]
    entries = [layer_cache(kv_cache, key) for key in keys]
    if not recurrent.steps_whole((h, e)):
        return None
    weights, lora = weights_of(blocks), recurrent.lora
    if lora is not None and obstacle("down", lora._modules["down"], nn.Linear):
        return None
    if weights is None or not all(holds(entry, mask, len(h)) for entry in entries):
        return None
    latent, k_rope = zip(*(blocks[i % len(blocks)].attn.room(entry, h) for i, entry in enumerate(entries)))
    lora_B, *step = (weight.contiguous() for weight in recurrent.weights())
    out = loop_decode(
        h.squeeze(1),
        e.squeeze(1),
        phasors_of(freqs_cis),
        torch.tensor(entries[0].lengths),
        latent,
        k_rope,
        weights,
        [] if lora is None else [lora.down.weight.contiguous(), lora.scale.weight.contiguous(), lora_B],
        step,
        embeddings,
        eps=recurrent.norm.eps,
        threshold=float(recurrent.cfg.act_threshold),
        spend_remainder=setting(recurrent.cfg, "act_remainder") == "last",
        residual=setting(recurrent.cfg, "injection") == "residual",
    )
    note(blocks, entries, out.expert_idx)
    return out
