"""The loop over running positions alone, where halted positions freeze.

Loop t computes the positions that still run, packed one behind another as (1, N, dim): norms, projections, experts and
step of these rows, and their attention to all positions before them, halted ones included. A position that halts leaves
with its result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import openmythos
from openmythos.attention import CausalMask
from openmythos.cache import LOOP_KEY, ragged_cache
from openmythos.config import setting
from openmythos.exits import ExitState, Look, after_loop
from openmythos.halting import ACTState
from openmythos.loop import Carry, LoopDriver
from openmythos.recurrence import check_arguments
from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.collected import Collected
from openmythos_kernels.nn.guards import fast_obstacle
from openmythos_kernels.nn.packed import PackedKeys
from openmythos_kernels.nn.paths import mla_packed
from openmythos_kernels.nn.paths.decode_loop import blocks_of
from openmythos_kernels.nn.paths.moe_repeated import summing_in_place
from openmythos_kernels.runtime.backends import Choice

WHEN = 'halting="freeze" or an exit; latent attention, a causal mask'


def choice(recurrent) -> Choice:
    reason = _obstacle(recurrent) if recurrent.trim else "trim is switched off"
    return Choice("reference", reason) if reason else Choice("pytorch")


def refuses(call: LoopCall) -> str:
    if call.halting != "freeze" or not isinstance(call.counts, int):
        return "halted positions do not freeze, or several numbers of loops"
    if call.checkpoint_loops or (call.grad and call.kv_cache is not None):
        return "checkpoint_loops, or gradients with a cache"
    if call.h.numel() == 0 or not call.free_shapes or call.transformed:
        return "no tokens, a graph, fake tensors or a transform"
    if not call.module.trim or call.module.scores is not None:
        return "trim is switched off, or router scores of all positions are recorded"
    if not _is_causal(call):
        return "the mask is not known to be causal"
    return _obstacle(call.module)


def run(call: LoopCall):
    recurrent, h = call.module, call.h
    check_arguments(recurrent.cfg, call.kv_cache, call.return_ponder, call.grad_loops, call.checkpoint_loops, call.exit)
    driver = PackedRows(call)
    e = recurrent.prepare(call.e)
    state = recurrent.halting(h, call.exit)[-1]
    freqs = call.freqs_cis.expand(len(h), *call.freqs_cis.shape[-2:])
    x = Carry(h, e, None, state, freqs, None)
    with summing_in_place(call):
        out, ponder = driver.join(driver.run(driver.packed(x)))
    out = recurrent.injection.readout(out)
    return (out, ponder) if call.return_ponder else out


class PackedRows(LoopDriver):
    """The loop driver whose batch is one sequence of rows, (1, N, dim): the positions that still run."""

    def __init__(self, call: LoopCall):
        super().__init__(call.module, call.counts, call.grad_loops, rule=call.rule, predict=call.predict)
        ragged = None if call.kv_cache is None else ragged_cache(call.kv_cache)
        self.packs = PackedKeys(tuple(call.h.shape[:2]), call.h.device, ragged, call.grad)
        self.collected = Collected(call.h.shape)
        self.act = call.rule is None
        self.whole: Tensor | None = None  # the states of all positions, for rules that read predictions
        # Under FSDP every loop has collectives: each rank runs all loops, with a row that writes nothing if it must.
        self.distributed = call.module.in_step(call.predict)

    def packed(self, x: Carry) -> Carry:
        """The carry before the first loop, of all positions."""
        return _change(x, _flat, self.packs)

    def keys(self, x: Carry, t: int) -> tuple[str, Any]:
        key = LOOP_KEY.format(t)
        self.packs.enter(key, t)
        return key, None

    def halted(self, x: Carry, before: Carry, t: int) -> Carry:
        if self.rule is None:
            return x
        look = Look(t, before.h, x.h, self.block.act, self.predict and self._predict)
        return x._replace(state=after_loop(self.rule, before.state, look))

    def remaining(self, x: Carry, t: int) -> Carry:
        """The carry without the positions that have halted."""
        running = x.state.running[0]
        kept = running.nonzero()[:, 0]
        if len(kept) == len(running):
            return x
        self._collect(x, (~running).nonzero()[:, 0])
        writes = None
        if not len(kept) and self.distributed:
            kept = torch.zeros(1, dtype=torch.int64, device=running.device)
            writes = torch.zeros(1, dtype=torch.bool, device=running.device)
        self.packs.select(self.packs.place[kept], writes)
        return _change(x, partial(_pick, rows=kept), self.packs)

    def finished(self, x: Carry) -> bool:
        return not x.h.shape[1]

    def end(self) -> None:
        self.packs.commit(self.n_loops)

    def join(self, x: Carry) -> tuple[Tensor, Tensor | None]:
        """Result (B, T, dim) and ponder cost (B, T) or None of all positions, after the last loop."""
        if self.packs.running is None:
            self._collect(x, torch.arange(x.h.shape[1], device=x.h.device))
        return self.collected.whole()

    def _collect(self, x: Carry, rows: Tensor) -> None:
        if self.packs.running is not None:
            return  # the row that stays for other ranks has been collected
        result, ponder = (x.state.h_out, x.state.ponder[0][rows]) if self.act else (x.h, None)
        self.collected.add(self.packs.place[rows], result[0].index_select(0, rows), ponder)

    def _predict(self, states: Tensor, coda: bool) -> Tensor:
        """Predictions of the rows. Through the coda all positions are computed."""
        predict: Any = self.predict
        if not coda:
            return predict(states, False)
        shape = (self.packs.batch, self.packs.tokens, states.shape[-1])
        if self.whole is None:
            self.whole = states.new_zeros(shape)
        self.whole.view(-1, shape[-1]).index_copy_(0, self.packs.place, states[0].detach())
        return predict(self.whole, True).flatten(0, 1)[self.packs.place].unsqueeze(0)


def _flat(y: Tensor) -> Tensor:
    """(B, T, ...) -> (1, B * T, ...)."""
    return y.flatten(0, 1).unsqueeze(0)


def _pick(y: Tensor, rows: Tensor) -> Tensor:
    """Some rows of (1, N, ...)."""
    return y[0].index_select(0, rows).unsqueeze(0)


def _change(x: Carry, change: Callable[[Tensor], Tensor], mask: Any) -> Carry:
    """The carry with all its tensors changed, and this mask."""
    if isinstance(x.state, ExitState):
        state: Any = ExitState(change(x.state.running), tuple(map(change, x.state.memory)))
    else:
        state = ACTState(*map(change, x.state))
    return Carry(change(x.h), change(x.e), None if x.u is None else change(x.u), state, change(x.freqs_cis), mask)


def _is_causal(call: LoopCall) -> bool:
    """Whether each query sees its own sequence's tokens up to itself, those of the cache included."""
    batch, tokens = call.h.shape[:2]
    held = ragged_cache(call.kv_cache).lengths if call.kv_cache is not None else []
    held = held or [0] * batch
    mask = call.mask
    if isinstance(mask, Tensor) and min(held) == max(held):
        mask = recognised(mask, tokens, held[0] + tokens)
    if mask is None:
        return tokens == 1 and min(held) == max(held)
    if type(mask) is not CausalMask or len(held) != batch:
        return False
    return all(n == mask.start for n in held) if isinstance(mask.start, int) else list(mask.start) == held


def _obstacle(recurrent) -> str:
    """Why the looped blocks must not be given some positions alone; empty when they may."""
    for block in blocks_of(recurrent)[0]:
        if reason := fast_obstacle("block", block, openmythos.TransformerBlock):
            return reason
        if setting(recurrent.cfg, "attn_type") != "mla":
            return "grouped-query attention"
        attn = block._modules["attn"]
        if reason := fast_obstacle("attn", attn, openmythos.MLAttention) or mla_packed.obstacle(attn):
            return reason
    return ""
