"""Decoding: one token per row through all loops of a recurrent block as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import openmythos
from openmythos.block import BlockStack
from openmythos.cache import LOOP_KEY, kept_loops, layer_cache
from openmythos.config import setting
from openmythos_kernels.nn.call import LoopCall, holds
from openmythos_kernels.nn.guards import fast_obstacle, obstacle
from openmythos_kernels.nn.paths import fused_step, mla_decode
from openmythos_kernels.nn.paths.decode_block import block_obstacle, not_now, note, packed, weights_of
from openmythos_kernels.ops.layer import LoraWeights, loop_decode
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = 'one cached token per row, no gradients, on a CPU; halting="evolve", one number of loops, every part plain'


def choice(recurrent) -> Choice:
    if setting(recurrent.cfg, "halting") != "evolve":
        return Choice("reference", f'halting="{setting(recurrent.cfg, "halting")}"')
    if reason := loop_obstacle(recurrent):
        return Choice("reference", reason)
    return choose("loop_decode", recurrent.act.halt.weight.device.type)


def refuses(call: LoopCall) -> str:
    recurrent, h = call.module, call.h
    if h.shape[1] != 1 or call.kv_cache is None:
        return "not one token per row with a cache"
    if call.halting != "evolve" or not isinstance(call.counts, int):
        return f'halting="{call.halting}" or several numbers of loops'
    if call.grad_loops is not None or call.checkpoint_loops or recurrent.watchers:
        return "grad_loops, checkpoint_loops or watchers"
    if reason := not_now(call, "loop_decode"):
        return reason
    if not (call.narrow and call.free_shapes):
        return "rotary angles are not complex64, or fake tensors"
    return loop_obstacle(recurrent, (h, call.e))


def run(call: LoopCall):
    recurrent, h, e = call.module, call.h, call.e
    blocks, stacked = blocks_of(recurrent)
    suffixes = [f".{i}" if stacked else "" for i in range(len(blocks))]
    kept = kept_loops(call.kv_cache) or call.counts  # fewer than loops: later ones overwrite what earlier ones wrote
    keys = [LOOP_KEY.format(t % kept) + suffix for t in range(call.counts) for suffix in suffixes]
    entries = [layer_cache(call.kv_cache, key) for key in keys]
    weights, lora = weights_of(blocks), recurrent.lora
    if weights is None or not all(holds(entry, call.mask, len(h)) for entry in entries):
        return NotImplemented
    latent, k_rope = zip(*(mla_decode.room(blocks[i % len(blocks)].attn, entry, h) for i, entry in enumerate(entries)))
    lora_B, step = fused_step.weights(recurrent)
    out = loop_decode(
        h.squeeze(1),
        e.squeeze(1),
        mla_decode.phasors_of(call.freqs_cis),
        torch.tensor(entries[0].lengths),
        latent,
        k_rope,
        weights,
        [] if lora is None else packed(LoraWeights(down=lora.down.weight, scale=lora.scale.weight, B=lora_B)),
        packed(step),
        [fused_step.embedding(call, t) for t in range(call.counts)],
        eps=recurrent.norm.eps,
        threshold=float(recurrent.cfg.act_threshold),
        spend_remainder=setting(recurrent.cfg, "act_remainder") == "last",
        residual=setting(recurrent.cfg, "injection") == "residual",
    )
    note(blocks, entries, out.expert_idx)
    result = out.h_out.unsqueeze(1)
    return (result, out.ponder.unsqueeze(1)) if call.return_ponder else result


def loop_obstacle(recurrent, states: tuple[Tensor, ...] = ()) -> str:
    """Why an op must not compute whole loops of a fast recurrent block, on h and e in `states`; empty when it may."""
    if not fused_step.is_whole(recurrent):
        return f'injection="{setting(recurrent.cfg, "injection")}"'
    found = fused_step.choice(recurrent, states)
    if not found.fast:
        return found.reason
    dtype = recurrent.act.halt.weight.dtype  # that of the states, too
    for block in blocks_of(recurrent)[0]:
        if reason := fast_obstacle("block", block, openmythos.TransformerBlock) or block_obstacle(block, dtype):
            return reason
    lora = recurrent.lora
    return "" if lora is None else obstacle("down", lora._modules["down"], nn.Linear)


def blocks_of(recurrent) -> tuple[list[nn.Module], bool]:
    """What is looped, and whether it is a stack."""
    core = recurrent._modules["block"]
    stacked = type(core) is BlockStack and not obstacle("block", core, BlockStack)
    return (list(core._modules.values()) if stacked else [core]), stacked
