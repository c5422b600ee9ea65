"""Decoding where halted positions freeze: one token per row, each until it halts, against a ragged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.attention import CausalMask
from openmythos.cache import kept_loops, ragged_cache
from openmythos.config import setting
from openmythos.exits import ExitState, Look, after_loop
from openmythos.ragged import RaggedCache
from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.paths import decode_loop, fused_step, mla_decode
from openmythos_kernels.nn.paths.decode_block import not_now, packed, weights_of
from openmythos_kernels.nn.paths.decode_loop import blocks_of
from openmythos_kernels.ops.layer import LoraWeights, loop_rows
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = 'one cached token per row, no gradients, on a CPU; halting="freeze" or an exit, every part plain'


def choice(recurrent) -> Choice:
    if reason := decode_loop.loop_obstacle(recurrent):
        return Choice("reference", reason)
    return choose("loop_rows", recurrent.act.halt.weight.device.type)


def refuses(call: LoopCall) -> str:
    h = call.h
    if h.shape[1] != 1 or call.kv_cache is None:
        return "not one token per row with a cache"
    if call.halting != "freeze" or not isinstance(call.counts, int):
        return "halted positions do not freeze, or several numbers of loops"
    if call.grad_loops is not None or call.checkpoint_loops:
        return "grad_loops or checkpoint_loops"
    if reason := not_now(call, "loop_rows"):
        return reason
    if not (call.narrow and call.free_shapes):
        return "rotary angles are not complex64, or fake tensors"
    if not _shows_cache(call):
        return "the mask does not show each row exactly its cache"
    return decode_loop.loop_obstacle(call.module, (h, call.e))


def run(call: LoopCall):
    recurrent, h = call.module, call.h
    blocks = blocks_of(recurrent)[0]
    weights = weights_of(blocks)
    if weights is None:
        return NotImplemented
    cache = ragged_cache(call.kv_cache)
    cache.start(len(h), h.device)
    held = list(cache.lengths)
    cache.extend([[call.counts - 1]] * len(h))
    try:
        rows = Rows(call, cache, held, weights)
        while rows.loop():
            pass
    except BaseException:
        cache.truncate(held)
        raise
    cache.settle((rows.ran - 1).tolist())
    cache.depth = min(call.counts, cache.depth or call.counts)
    out = rows.h if call.rule is not None else rows.h_out
    result = recurrent.injection.readout(out.unsqueeze(1))
    return (result, rows.ponder.unsqueeze(1)) if call.return_ponder else result


class Rows:
    """The tokens of one call, a row each, and what their loops change."""

    def __init__(self, call: LoopCall, cache: RaggedCache, held: list[int], weights):
        recurrent, h = call.module, call.h.squeeze(1)
        self._call, self._cache, self._blocks = call, cache, weights
        names = layer_names(recurrent)
        attn: Any = blocks_of(recurrent)[0][0]._modules["attn"]
        like = {"latent": h.new_empty(0, attn.kv_lora_rank), "k_rope": h.new_empty(0, attn.qk_rope_dim)}
        self._pools = [cache.pool(name, **like) for name in names]
        self.h, self.h_out = h.clone(), torch.zeros_like(h)
        positions = h.new_zeros(len(h), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        self.cumulative_p, self.ponder = positions, positions.clone()
        self.ran = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        self.state = ExitState(torch.ones(len(h), dtype=torch.bool, device=h.device), ())
        if call.rule is not None:
            self.state = ExitState.start(call.rule, call.h)._replace(running=self.state.running)
        self._limit = torch.full_like(self.ran, call.counts)
        self._position = torch.tensor(held, device=h.device)
        self._sequence = torch.arange(len(h), device=h.device)
        self._freqs = mla_decode.phasors_of(call.freqs_cis).expand(len(h), -1, -1).contiguous()
        lora, (lora_B, self._step) = recurrent.lora, fused_step.weights(recurrent)
        parts = None if lora is None else LoraWeights(down=lora.down.weight, scale=lora.scale.weight, B=lora_B)
        self._lora = [] if parts is None else packed(parts)
        self._embeddings = [fused_step.embedding(call, t) for t in range(call.counts)]
        self._t = 0

    def loop(self) -> bool:
        """Runs loops; whether there are more. Whoever looks on, a rule or a watcher, sees every single one."""
        call, recurrent = self._call, self._call.module
        single = call.rule is not None or bool(recurrent.watchers)
        running = self.state.running
        if single:
            recurrent.watch(running.unsqueeze(1), self._t)
        before = self.h.clone() if call.rule is not None else self.h
        loop_rows(
            self.h,
            call.e.squeeze(1).contiguous(),
            self.h_out,
            self.cumulative_p,
            self.ponder,
            running,
            self.ran,
            self._limit,
            self._freqs,
            self._sequence,
            self._position,
            self._cache.first,
            self._cache.last,
            [pool["latent"] for pool in self._pools],
            [pool["k_rope"] for pool in self._pools],
            self._blocks,
            self._lora,
            packed(self._step),
            self._embeddings,
            keep=kept_loops(call.kv_cache) or 0,
            eps=recurrent.norm.eps,
            threshold=float(recurrent.cfg.act_threshold),
            spend_remainder=setting(recurrent.cfg, "act_remainder") == "last",
            residual=setting(recurrent.cfg, "injection") == "residual",
            freeze=True,
            act=call.rule is None,
            loops=1 if single else call.counts,
        )
        if call.rule is not None:
            look = Look(self._t, before.unsqueeze(1), self.h.unsqueeze(1), recurrent.act, call.predict)
            state = after_loop(call.rule, self.state._replace(running=running.unsqueeze(1)), look)
            self.state = state._replace(running=state.running.squeeze(1))
        self._t += 1
        return single and self._t < call.counts and bool(self.state.running.any())


def layer_names(recurrent) -> list[str]:
    """The looped layers, as a ragged cache names them."""
    blocks, stacked = blocks_of(recurrent)
    return [f".{i}" if stacked else "" for i in range(len(blocks))]


def _shows_cache(call: LoopCall) -> bool:
    """Whether `mask` shows each row all that its sequence holds, and nothing else."""
    held, mask = ragged_cache(call.kv_cache).lengths or [0] * len(call.h), call.mask
    if isinstance(mask, Tensor) or len(held) != len(call.h):
        return False
    if mask is None:
        return min(held) == max(held)
    if type(mask) is not CausalMask:
        return False
    return all(n == mask.start for n in held) if isinstance(mask.start, int) else list(mask.start) == held
