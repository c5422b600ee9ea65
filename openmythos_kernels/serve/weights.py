"""What the ops over rows take of a model, and why some models cannot be served."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import openmythos
from openmythos.config import setting
from openmythos.injection import loop_index_embedding
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.guards import fast_obstacle, is_fast, obstacle
from openmythos_kernels.nn.paths import fused_step
from openmythos_kernels.nn.paths.decode_block import block_obstacle, packed, weights_of
from openmythos_kernels.nn.paths.decode_loop import blocks_of, loop_obstacle
from openmythos_kernels.ops.layer import LoraWeights


class Weights:
    """The parts of a model by the names that the ops have for them.

    Attributes:
        prelude, coda: `BlockWeights` of each block outside the loop. core: those of all looped blocks.
        cores: how many blocks are looped.
        lora, step, embed, head: the other weights. norm, act, recurrent: the modules, for their numbers, for
            exits and for watchers.
        angles: (max_seq_len, rope / 2, 2) float32, (cos, sin) of every position.
        latent, rope: the widths of what the cache keeps of a token per layer.
        halting: the configuration's.
        options: the keyword arguments of `loop_rows` that the model decides.

    Raises:
        ValueError: the ops cannot stand in for a part of the model.
    """

    def __init__(self, model: Any):
        if reason := obstacle_of(model):
            raise ValueError(f"model: cannot be served: {reason}")
        cfg, recurrent = model.cfg, model.recurrent
        blocks = blocks_of(recurrent)[0]
        self.cfg = cfg
        self.prelude = [weights_of([block]) for block in model.prelude]
        self.coda = [weights_of([block]) for block in model.coda]
        self.core, self.cores = weights_of(blocks), len(blocks)
        lora, (lora_B, step) = recurrent.lora, fused_step.weights(recurrent)
        self.lora = [] if lora is None else packed(LoraWeights(lora.down.weight, lora.scale.weight, lora_B))
        self.step = packed(step)
        self.norm, self.head = model.norm, model.head.weight
        self.embed, self.act, self.recurrent = model.embed.weight, recurrent.act, recurrent
        self.dtype, self.device = self.embed.dtype, self.embed.device
        self.angles = torch.view_as_real(model.freqs_cis_mla)
        self.latent, self.rope = int(cfg.kv_lora_rank), int(cfg.qk_rope_head_dim)
        self.halting, self.h0 = setting(cfg, "halting"), setting(cfg, "h0")
        self.options = dict(
            eps=recurrent.norm.eps,
            threshold=float(cfg.act_threshold),
            spend_remainder=setting(cfg, "act_remainder") == "last",
            residual=setting(cfg, "injection") == "residual",
        )
        self._embeddings: list[Tensor] = []

    def embeddings(self, loops: int) -> list[Tensor]:
        """Those of the numbers of at least so many loops."""
        for t in range(len(self._embeddings), loops):
            self._embeddings.append(loop_index_embedding(t, self.cfg.dim // 8, self.device, self.dtype))
        return self._embeddings


def obstacle_of(model: Any) -> str:
    """Why the ops over rows must not stand in for the parts of a model; empty when they may."""
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
        return 'h0="noise": tokens would depend on the order in which requests draw their noise'
    return "" if weights_of(blocks_of(recurrent)[0]) else "the looped blocks are of different kinds"
