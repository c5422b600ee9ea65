"""Decoding: one token per row through all loops of a recurrent block as one op."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

import openmythos
from openmythos.block import BlockStack
from openmythos.cache import LOOP_KEY, kept_loops, layer_cache
from openmythos.compat import capturing
from openmythos.config import setting
from openmythos_kernels.nn import lengths
from openmythos_kernels.nn.call import LoopCall, holds
from openmythos_kernels.nn.guards import fast_obstacle, obstacle
from openmythos_kernels.nn.paths import fused_step, mla_decode
from openmythos_kernels.nn.paths.decode_block import GPU_ROWS, block_obstacle, not_now, note, packed, weights_of
from openmythos_kernels.ops.layer import BlockWeights, LoraWeights, loop_decode
from openmythos_kernels.runtime.backends import Choice, choose
from openmythos_kernels.runtime.unproven import SWITCH

WHEN = (
    'one cached token per row, no gradients; halting="evolve" or "off", every part plain; on a CPU, or on a GPU for up '
    f"to {GPU_ROWS} rows with {SWITCH}=1"
)


class LoopWeights(NamedTuple):
    """What ops that run whole loops take of a recurrent block.

    Attributes:
        blocks: of all looped blocks. lora: `LoraWeights`, or nothing. step: `StepWeights`.
        options: keyword arguments that the block decides.
    """

    blocks: BlockWeights
    lora: list[Tensor]
    step: list[Tensor]
    options: dict[str, Any]


def choice(recurrent) -> Choice:
    if setting(recurrent.cfg, "halting") == "freeze":
        return Choice("reference", 'halting="freeze"')
    if reason := loop_obstacle(recurrent):
        return Choice("reference", reason)
    return choose("loop_decode", recurrent.act.halt.weight.device.type)


def refuses(call: LoopCall) -> str:
    recurrent, h = call.module, call.h
    if h.shape[1] != 1 or call.kv_cache is None:
        return "not one token per row with a cache"
    if call.halting == "freeze" or not isinstance(call.counts, int):
        return 'halting="freeze" or several numbers of loops'
    if call.grad_loops is not None or call.checkpoint_loops or recurrent.watchers:
        return "grad_loops, checkpoint_loops or watchers"
    if call.return_trajectory or (call.return_ponder and call.halting == "off"):
        return "the states of every loop, or a ponder cost without halting"
    if reason := not_now(call, "loop_decode"):
        return reason
    # A capture runs every loop, as the op does.
    if not (call.narrow and (call.free_shapes or capturing(h.device))):
        return "rotary angles are not complex64, or fake tensors"
    return loop_obstacle(recurrent, (h, call.e))


def run(call: LoopCall):
    recurrent, h = call.module, call.h
    blocks = blocks_of(recurrent)[0]
    entries = [layer_cache(call.kv_cache, key) for key in loop_keys(recurrent, call.counts, call.kv_cache)]
    weights = loop_weights(recurrent)
    if weights is None or not all(holds(entry, call.mask, len(h)) for entry in entries):
        return NotImplemented
    latent, k_rope = zip(*(mla_decode.room(blocks[i % len(blocks)].attn, entry, h) for i, entry in enumerate(entries)))
    out = loop_decode(
        h.squeeze(1),
        call.e.squeeze(1),
        mla_decode.phasors_of(call.freqs_cis),
        lengths.on_device(entries[0].lengths, h.device, layers=len(entries)),
        latent,
        k_rope,
        *weights[:3],
        [fused_step.embedding(call, t) for t in range(call.counts)],
        act=call.halting != "off",
        **weights.options,
    )
    note(blocks, entries, out.expert_idx)
    result = out.h_out.unsqueeze(1)
    return (result, out.ponder.unsqueeze(1)) if call.return_ponder else result


def loop_keys(recurrent, loops: int, kv_cache: dict) -> list[str]:
    """The cache keys of every loop and block, in running order."""
    kept = kept_loops(kv_cache) or loops  # fewer than loops: later ones overwrite what earlier ones wrote
    return [LOOP_KEY.format(t % kept) + name for t in range(loops) for name in layer_names(recurrent)]


def layer_names(recurrent) -> list[str]:
    """What distinguishes the looped layers inside a loop."""
    blocks, stacked = blocks_of(recurrent)
    return [f".{i}" if stacked else "" for i in range(len(blocks))]


def loop_weights(recurrent) -> LoopWeights | None:
    """A recurrent block's weights; None where the looped blocks are of different kinds."""
    blocks, lora = weights_of(blocks_of(recurrent)[0]), recurrent.lora
    if blocks is None:
        return None
    lora_B, step = fused_step.weights(recurrent)
    options = dict(
        eps=recurrent.norm.eps,
        threshold=float(recurrent.cfg.act_threshold),
        spend_remainder=setting(recurrent.cfg, "act_remainder") == "last",
        residual=setting(recurrent.cfg, "injection") == "residual",
    )
    packed_lora = [] if lora is None else packed(LoraWeights(down=lora.down.weight, scale=lora.scale.weight, B=lora_B))
    return LoopWeights(blocks, packed_lora, packed(step), options)


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
