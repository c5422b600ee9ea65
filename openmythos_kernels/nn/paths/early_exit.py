"""The loop over a batch that shrinks: exact savings with halting="evolve", and "off" with a depth per sequence.

A sequence leaves the batch once it has halted or run its own number of loops. Positions behind the last one that runs
in any sequence are cut off: causal attention never looks back from them. The rest computes what it would compute in the
whole batch, so outputs and gradients are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openmythos.attention import CausalMask, Mask
from openmythos.config import setting
from openmythos.loop import Carry, LoopDriver, first_with_gradients
from openmythos.recurrence import ACTState, check_arguments
from openmythos.trajectory import Recorder
from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.collected import Collected
from openmythos_kernels.nn.guards import takes_causal
from openmythos_kernels.nn.paths.moe_repeated import summing_in_place
from openmythos_kernels.nn.thresholds import threshold
from openmythos_kernels.ops.loop import ExitCounter
from openmythos_kernels.runtime.backends import Choice

WHEN = 'no cache, no exit; halting="evolve", or depths of their own with halting="off"'


def choice(recurrent) -> Choice:
    halting = setting(recurrent.cfg, "halting")
    return Choice("reference", 'halting="freeze"') if halting == "freeze" else Choice("pytorch")


def refuses(call: LoopCall) -> str:
    if call.kv_cache is not None or call.halting == "freeze":
        return 'a cache, or halting="freeze"'
    if call.halting == "off" and isinstance(call.counts, int):
        return "every sequence runs every loop"
    if call.h.numel() == 0:
        return "no tokens"
    return "" if call.free_shapes else "a compiled, traced or captured graph, or fake tensors"


def run(call: LoopCall):
    recurrent, h, mask = call.module, call.h, call.mask
    check_arguments(
        recurrent.cfg,
        call.kv_cache,
        call.return_ponder,
        call.grad_loops,
        call.checkpoint_loops,
        call.exit,
        call.return_trajectory,
    )
    if isinstance(mask, Tensor) and takes_causal(recurrent.block):
        mask = recognised(mask, h.shape[1], h.shape[1])
    counts = [call.counts] * len(h) if isinstance(call.counts, int) else call.counts
    state = None if call.halting == "off" else ACTState.start(h)
    x = Carry(h, recurrent.prepare(call.e), None, state, call.freqs_cis, mask)
    recorder = Recorder() if call.return_trajectory else None
    driver = ShrinkingBatch(
        recurrent, x, counts, call.grad_loops, call.checkpoint_loops, recurrent.trim, recurrent.agree, recorder
    )
    with summing_in_place(call):
        end = driver.run(x)
        if recorder is not None:
            return recorder.trajectory(recurrent.act, recurrent.injection.readout)
        out, ponder = driver.join(end)
    out = recurrent.injection.readout(out)
    return (out, ponder) if call.return_ponder else out


class ShrinkingBatch(LoopDriver):
    """The loop driver that stops computing what has nothing left to do.

    Args:
        block, grad_loops, checkpoint_loops, recorder: as for the driver.
        x: the carry before the first loop, of the whole batch.
        counts: loops of every sequence.
        trim: whether what has halted leaves the batch early.
        agree: whether ranks agree on stopping early. Otherwise each runs max(counts) loops, equal on all ranks.
    """

    def __init__(
        self,
        block,
        x: Carry,
        counts: list[int],
        grad_loops,
        checkpoint_loops,
        trim: bool,
        agree: bool,
        recorder: Recorder | None = None,
    ):
        super().__init__(block, max(counts), grad_loops, checkpoint_loops, recorder=recorder)
        self.counts = counts
        self.starts = [first_with_gradients(n, grad_loops) for n in counts]
        self.whole = block.scores is not None  # every position runs every loop
        self.trim = x.state is not None and trim and not self.whole
        self.idle = False  # runs for other ranks alone
        self.leaves = self.trim or len(set(counts)) > 1
        self.agree = agree
        self.distributed = block.in_step(None)
        self.rows = torch.arange(len(x.h), device=x.h.device)  # the places of the batch's sequences in the whole batch
        self.places = list(range(len(x.h)))  # the same, on the host
        self.collected = Collected(x.h.shape)
        self.counter = ExitCounter(int(threshold("early_exit_lag_cuda" if x.h.is_cuda else "early_exit_lag")))

    def gradients_from(self) -> list[int]:
        """One number for each sequence that is still in the batch."""
        return [self.starts[b] for b in self.places]

    def sequences(self) -> Tensor:
        return self.rows[:0] if self.idle else self.rows

    def body(self, x: Carry, cache, key: str, t: int) -> Callable:
        """As the driver's, for sequences of which some are in their last loop."""
        return partial(_body, self.block, x.freqs_cis, x.mask, key, t, self._ending(t))

    def remaining(self, x: Carry, t: int) -> Carry:
        """The carry without what has halted or run all its loops."""
        return self._leave(x, self._ending(t)) if self.leaves else x

    def finished(self, x: Carry) -> bool:
        """Whether the batch is empty or has halted; with several ranks, whether it has on all of them."""
        if self.distributed:
            return self.agree and not self.whole and not _any_rank(x)
        if not self.places:
            return True
        if x.state is None or self.trim or self.whole:  # what has halted has left, or stays
            return False
        self.counter.record(x.state.running.sum().reshape(1))
        return self.counter.finished()

    def join(self, x: Carry) -> tuple[Tensor, Tensor | None]:
        """Result (B, T, dim) and ponder cost (B, T) or None of the whole batch, after the last loop."""
        if x.h.shape[:2] == (self.collected.batch, self.collected.tokens):  # nothing left early
            return (x.h, None) if x.state is None else (x.state.h_out, x.state.ponder)
        if self.places:
            self._collect(x, torch.arange(len(self.places), device=x.h.device), 0)
        return self.collected.whole()

    def _ending(self, t: int) -> list[bool]:
        """For each sequence of the batch, whether loop t is its last."""
        return [self.counts[b] == t + 1 for b in self.places]

    def _leave(self, x: Carry, ending: list[bool]) -> Carry:
        """Removes what is done. Where other ranks run on, one position of one sequence stays."""
        tokens = x.h.shape[1]
        gone, length = list(ending), tokens
        if self.trim and x.state is not None:
            running = x.state.running
            reach = (running.any(0) * torch.arange(1, tokens + 1, device=running.device)).amax()
            *rows, reach = torch.cat((running.any(1).long(), reach.reshape(1))).tolist()  # the host waits once
            gone = [g or not r for g, r in zip(gone, rows)]
            if can_cut_positions(x.mask):
                length = max(reach, 1)
        kept = [i for i, g in enumerate(gone) if not g]
        if not kept and self.distributed:
            kept, self.idle = [0], True
        if not any(ending) and kept and len(kept) * length > (1 - threshold("early_exit_share")) * len(gone) * tokens:
            return x
        device = x.h.device
        left = torch.tensor([i for i in range(len(gone)) if i not in set(kept)], dtype=torch.int64, device=device)
        keep = torch.tensor(kept, dtype=torch.int64, device=device)
        if len(left):
            self._collect(x, left, 0)
        if kept and length < tokens:
            self._collect(x, keep, length)
        self.rows, self.places = self.rows[keep], [self.places[i] for i in kept]
        return _take(x, keep, length)

    def _collect(self, x: Carry, keep: Tensor, first: int) -> None:
        """Collects the results of the sequences `keep` (indices into the batch) from position `first` on."""
        result = x.h if x.state is None else x.state.h_out
        pick = partial(torch.index_select, dim=0, index=keep)
        ponder = None if x.state is None else pick(x.state.ponder)[:, first:].flatten()
        columns = torch.arange(first, result.shape[1], device=keep.device)
        places = (self.rows[keep][:, None] * self.collected.tokens + columns).flatten()
        self.collected.add(places, pick(result)[:, first:].flatten(0, 1), ponder)


def can_cut_positions(mask: Mask) -> bool:
    """Whether later positions can leave: no earlier one attends to them."""
    return isinstance(mask, CausalMask) and mask.start == 0


def _take(x: Carry, keep: Tensor, tokens: int) -> Carry:
    """The first `tokens` positions of the sequences `keep` (indices into the batch)."""

    def cut(y: Any) -> Any:
        if y is None:
            return None
        y = y if tokens == y.shape[1] else y[:, :tokens]
        return y if len(keep) == len(y) else y.index_select(0, keep)

    freqs = x.freqs_cis[..., :tokens, :]
    if freqs.dim() == 3:
        freqs = freqs.index_select(0, keep)
    mask = x.mask
    if isinstance(mask, CausalMask):
        mask = CausalMask(mask.start, tokens)
    elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask.index_select(0, keep)
    state = None if x.state is None else ACTState(*map(cut, x.state))
    return Carry(cut(x.h), cut(x.e), cut(x.u), state, freqs, mask)


def _body(block, freqs_cis, mask, key: str, t: int, ending: list[bool], h, e, u, state) -> tuple:
    """Loop t; `ending` says whose last it is."""
    f = block.block(u, freqs_cis, mask, None, key)
    if all(ending) or not any(ending):
        return block.step(h, e, u, f, state, t, all(ending))
    # The step of a last loop may differ (act_remainder="last"), so each kind of sequence gets its own.
    device = h.device
    parts = [torch.tensor([i for i, end in enumerate(ending) if end == kind], device=device) for kind in (False, True)]
    out = []
    for rows, last in zip(parts, (False, True)):
        pick = partial(torch.index_select, dim=0, index=rows)
        part = None if state is None else ACTState(*map(pick, state))
        out.append(block.step(pick(h), pick(e), pick(u), pick(f), part, t, last))
    back = torch.cat(parts).argsort()

    def join(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat((one, other)).index_select(0, back)

    (h0, s0, u0), (h1, s1, _) = out
    joined = None if s0 is None else ACTState(*map(join, s0, s1))
    return join(h0, h1), joined, join(u0, torch.zeros_like(h1))  # sequences that leave read no next u


def _any_rank(x: Carry) -> bool:
    """Whether a position runs on any rank: the ranks leave the loop together."""
    flag = x.state.running.any().to(torch.int32) if x.state is not None else torch.ones((), dtype=torch.int32)
    flag = flag.reshape(1)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
