"""What ops that compute whole layers take of a model, and why they must not stand in for the parts of some models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import openmythos
from openmythos.config import setting
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.guards import fast_obstacle, is_fast, obstacle
from openmythos_kernels.nn.paths import fused_step
from openmythos_kernels.nn.paths.decode_block import block_obstacle, weights_of
from openmythos_kernels.nn.paths.decode_loop import LoopWeights, blocks_of, loop_obstacle, loop_weights


class ModelWeights:
    """The parts of a model by the names that the ops have for them. `obstacle_of` must have found nothing.

    Attributes:
        prelude, coda: `BlockWeights` of each block outside the loop. core: those of all looped blocks.
        cores: how many blocks are looped.
        loop: `LoopWeights`, whose parts are core, lora, step and options.
        embed, head: the other weights. norm, act, recurrent: modules, for their numbers and for exits and watchers.
        angles: (max_seq_len, rope / 2, 2) float32, (cos, sin) of every position.
        latent, rope: the widths of what the cache keeps of a token per layer.
        halting, h0: the configuration's.
    """

    def __init__(self, model: Any):
        cfg, recurrent = model.cfg, model.recurrent
        self.cfg = cfg
        self.prelude = [weights_of([block]) for block in model.prelude]
        self.coda = [weights_of([block]) for block in model.coda]
        self.loop: LoopWeights = loop_weights(recurrent)  # type: ignore[assignment]
        self.core, self.lora, self.step, self.options = self.loop
        self.cores = len(blocks_of(recurrent)[0])
        self.norm, self.head = model.norm, model.head.weight
        self.embed, self.act, self.recurrent = model.embed.weight, recurrent.act, recurrent
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.angles = torch.view_as_real(model.freqs_cis_mla)
        self.latent, self.rope = int(cfg.kv_lora_rank), int(cfg.qk_rope_head_dim)
        self.halting, self.h0 = setting(cfg, "halting"), setting(cfg, "h0")

    def embeddings(self, loops: int) -> list[Tensor]:
        """Those of the numbers of so many loops."""
        return [fused_step.kept_embedding(t, self.cfg.dim // 8, self.device, self.dtype) for t in range(loops)]


def obstacle_of(model: Any) -> str:
    """Why ops must not stand in for the parts of a model; empty when they may."""
    if not is_fast(model, openmythos.OpenMythos):
        return f"it is a {type(model).__name__}, no OpenMythos that openmythos_kernels.accelerate has swapped"
    if reason := fast_obstacle("model", model, openmythos.OpenMythos):
        return reason
    for name, kind in {"embed": nn.Embedding, "norm": RMSNorm, "head": nn.Linear}.items():
        if reason := obstacle(name, model._modules[name], kind):
            return reason
    if model.freqs_cis_mla.dtype != torch.complex64:
        return "rotary angles are not complex64"
    dtype, recurrent = model.embed.weight.dtype, model.recurrent
    if {model.head.weight.dtype, model.norm.weight.dtype} != {dtype}:
        return "the head and the final norm are of another dtype than the embedding"
    for name in ("prelude", "coda"):
        for i, block in enumerate(model._modules[name]):
            where = f"{name}_{i}"
            if reason := fast_obstacle(where, block, openmythos.TransformerBlock) or block_obstacle(block, dtype):
                return reason if reason.startswith(where) else f"{where}: {reason}"
    reason = fast_obstacle("recurrent", recurrent, openmythos.RecurrentBlock)
    if reason := reason or loop_obstacle(recurrent):
        return reason
    if recurrent.act.halt.weight.dtype != dtype:
        return "the recurrent block is of another dtype than the embedding"
    if setting(model.cfg, "h0") == "noise":
        return 'h0="noise": a token depends on the order in which noise is drawn'
    return "" if weights_of(blocks_of(recurrent)[0]) else "the looped blocks are of different kinds"
