"""Decoding where halted positions freeze: one token per row, each until it halts, against a ragged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.attention import CausalMask
from openmythos.cache import ragged_cache
from openmythos.exits import ExitState, Look, after_loop
from openmythos.ragged import RaggedCache
from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.paths import decode_loop, fused_step, mla_decode
from openmythos_kernels.nn.paths.decode_block import not_now
from openmythos_kernels.nn.paths.decode_loop import LoopWeights, blocks_of, layer_names, loop_weights
from openmythos_kernels.ops.layer import loop_rows
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
    recurrent = call.module
    weights = loop_weights(recurrent)
    if weights is None:
        return NotImplemented
    rows = Rows(
        recurrent,
        weights,
        call.h.squeeze(1),
        call.e.squeeze(1),
        mla_decode.phasors_of(call.freqs_cis),
        [fused_step.embedding(call, t) for t in range(call.counts)],
        call.rule,
        call.predict,
    )
    result = rows.decode(call.kv_cache).unsqueeze(1)
    return (result, rows.ponder.unsqueeze(1)) if call.return_ponder else result


class Rows:
    """One token per row, and what its loops change.

    Args:
        h, e: (B, D): the state before the first loop, and the input that each loop injects.
        phasors: (B or 1, rope / 2, 2) float32.
        embeddings: of the number of each loop that may run.
        rule, predict: as of `LoopCall`.
    """

    def __init__(
        self, recurrent, weights: LoopWeights, h: Tensor, e: Tensor, phasors: Tensor, embeddings, rule, predict
    ):
        self._recurrent, self._weights, self._embeddings = recurrent, weights, embeddings
        self._rule, self._predict = rule, predict
        self.h, self._e, self.h_out = h.clone(), e.contiguous(), torch.zeros_like(h)
        positions = h.new_zeros(len(h), dtype=torch.float64 if h.dtype == torch.float64 else torch.float32)
        self.cumulative_p, self.ponder = positions, positions.clone()
        self._ran = torch.zeros(len(h), dtype=torch.int64, device=h.device)
        running = torch.ones(len(h), dtype=torch.bool, device=h.device)
        self._state = ExitState(running, () if rule is None else rule.start(h.unsqueeze(1)))
        self._limit = torch.full_like(self._ran, len(embeddings))
        self._sequence = torch.arange(len(h), device=h.device)
        self._freqs = phasors.expand(len(h), -1, -1).contiguous()
        self._t = 0

    def decode(self, kv_cache: dict) -> Tensor:
        """Appends the tokens to the cache, and runs their loops; (B, D)."""
        cache, h, loops = ragged_cache(kv_cache), self.h, len(self._embeddings)
        cache.start(len(h), h.device)
        held = list(cache.lengths)
        self._position = torch.tensor(held, device=h.device)
        cache.extend([[loops - 1]] * len(h))
        attn: Any = blocks_of(self._recurrent)[0][0]._modules["attn"]
        like = {"latent": h.new_empty(0, attn.kv_lora_rank), "k_rope": h.new_empty(0, attn.qk_rope_dim)}
        pools = [cache.pool(name, **like) for name in layer_names(self._recurrent)]
        try:
            while self._loop(cache, pools):
                pass
        except BaseException:
            cache.truncate(held)
            raise
        cache.settle((self._ran - 1).tolist())
        cache.depth = min(loops, cache.depth or loops)
        out = self.h if self._rule is not None else self.h_out
        return self._recurrent.injection.readout(out)

    def _loop(self, cache: RaggedCache, pools: list[dict[str, Tensor]]) -> bool:
        """Runs loops; whether there are more. Whoever looks on, a rule or a watcher, sees every single one."""
        recurrent, loops, rule = self._recurrent, len(self._embeddings), self._rule
        single = rule is not None or bool(recurrent.watchers)
        running = self._state.running
        if single:
            recurrent.watch(running.unsqueeze(1), self._t)
        before = self.h if rule is None else self.h.clone()
        loop_rows(
            self.h,
            self._e,
            self.h_out,
            self.cumulative_p,
            self.ponder,
            running,
            self._ran,
            self._limit,
            self._freqs,
            self._sequence,
            self._position,
            cache.first,
            cache.last,
            [pool["latent"] for pool in pools],
            [pool["k_rope"] for pool in pools],
            *self._weights[:3],
            self._embeddings,
            keep=cache.keep or 0,
            freeze=True,
            act=rule is None,
            loops=1 if single else loops,
            **self._weights.options,
        )
        if rule is not None:
            look = Look(self._t, before.unsqueeze(1), self.h.unsqueeze(1), recurrent.act, self._predict)
            state = after_loop(rule, self._state._replace(running=running.unsqueeze(1)), look)
            self._state = state._replace(running=state.running.squeeze(1))
        self._t += 1
        return single and self._t < loops and bool(self._state.running.any())


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
