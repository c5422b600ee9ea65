"""The loop over a batch that shrinks: exact savings with halting="evolve" (and "off" with depths of their own).

A sequence leaves the batch when it has halted or run its own number of loops; positions behind the last one that still
runs in any sequence are cut off, since causal attention never looks back from them. What is left computes exactly what
it would have computed in the whole batch, so outputs and gradients are those of the reference.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.attention import CausalMask, Mask
from openmythos.cache import LOOP_KEY
from openmythos.config import setting
from openmythos.recurrence import ACTState, check_arguments
from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.guards import takes_causal
from openmythos_kernels.nn.paths.moe_repeated import summing_in_place
from openmythos_kernels.nn.thresholds import threshold
from openmythos_kernels.ops.loop import ExitCounter
from openmythos_kernels.runtime.backends import Choice

WHEN = 'no cache; halting="evolve", or depths of their own with halting="off"'


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
    return "" if call.free_shapes else "a compiled or traced graph, or fake tensors"


def run(call: LoopCall):
    recurrent, h, mask = call.module, call.h, call.mask
    check_arguments(recurrent.cfg, call.kv_cache, call.return_ponder, call.grad_loops, call.checkpoint_loops)
    if isinstance(mask, Tensor) and takes_causal(recurrent.block):
        mask = recognised(mask, h.shape[1], h.shape[1])
    counts = [call.counts] * len(h) if isinstance(call.counts, int) else call.counts
    options = call.grad_loops, call.checkpoint_loops, recurrent.trim, recurrent.agree
    with summing_in_place(recurrent.block):
        out, ponder = loops(recurrent, h, call.e, call.freqs_cis, mask, counts, *options)
    out = recurrent.injection.readout(out)
    return (out, ponder) if call.return_ponder else out


class Batch(NamedTuple):
    """What is still computed."""

    rows: Tensor  # (b,) int64: its sequences' places in the whole batch
    h: Tensor  # (b, t, dim)
    e: Tensor
    u: Tensor | None
    state: ACTState | None  # None without ACT
    freqs_cis: Tensor
    mask: Mask

    def take(self, keep: Tensor, tokens: int) -> Batch:
        """The sequences `keep` (indices into this batch), their first `tokens` positions."""

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x if tokens == x.shape[1] else x[:, :tokens]
            return x if len(keep) == len(x) else x.index_select(0, keep)

        freqs = self.freqs_cis[..., :tokens, :]
        if freqs.dim() == 3:
            freqs = freqs.index_select(0, keep)
        mask = self.mask
        if isinstance(mask, CausalMask):
            mask = CausalMask(mask.start, tokens)
        elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask.index_select(0, keep)
        state = None if self.state is None else ACTState(*map(cut, self.state))
        return Batch(self.rows[keep], cut(self.h), cut(self.e), cut(self.u), state, freqs, mask)


class Collected:
    """Results of what has left, put together at the end in the whole batch's order."""

    def __init__(self, shape: torch.Size, device: torch.device):
        self.batch, self.tokens = shape[:2]
        self.device = device
        self.places: list[Tensor] = []
        self.results: list[Tensor] = []
        self.ponder: list[Tensor] = []

    def add(self, rows: Tensor, first: int, result: Tensor, ponder: Tensor | None) -> None:
        """Positions from `first` on of sequences `rows`, (b, t, dim)."""
        if result.numel() == 0:
            return
        columns = first + torch.arange(result.shape[1], device=self.device)
        self.places.append((rows[:, None] * self.tokens + columns).flatten())
        self.results.append(result.flatten(0, 1))
        if ponder is not None:
            self.ponder.append(ponder.flatten())

    def whole(self) -> tuple[Tensor, Tensor | None]:
        shape = (self.batch, self.tokens)
        if len(self.results) == 1:
            return self.results[0].unflatten(0, shape), self.ponder[0].unflatten(0, shape) if self.ponder else None
        back = torch.cat(self.places).argsort()
        result = torch.cat(self.results).index_select(0, back).unflatten(0, shape)
        return result, torch.cat(self.ponder).index_select(0, back).unflatten(0, shape) if self.ponder else None


def can_cut_positions(mask: Mask) -> bool:
    return isinstance(mask, CausalMask) and mask.start == 0


def loops(block, h, e, freqs_cis, mask, counts: list[int], grad_loops, checkpoint_loops, trim, agree) -> tuple:
    """The loops of `block` (a RecurrentBlock) without a cache, sequence b counts[b] times.

    Args:
        trim: whether what has halted leaves early.
        agree: whether ranks agree on stopping early; else all of them run max(counts) loops, which must be equal.

    Returns:
        Result (B, T, dim) before the read-out, ponder cost (B, T) or None.
    """
    act = setting(block.cfg, "halting") != "off"
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    most, same = max(counts), len(set(counts)) == 1
    first_graded = [0 if grad_loops is None else n - int(grad_loops) for n in counts]
    collected = Collected(h.shape, h.device)
    e = block.injection.prepare(e, block.norm)
    now = Batch(torch.arange(len(h), device=h.device), h, e, None, ACTState.start(h) if act else None, freqs_cis, mask)
    numbers = list(range(len(h)))  # now.rows, for the host
    counter = ExitCounter(int(threshold("early_exit_lag_cuda" if h.is_cuda else "early_exit_lag")))
    for t in range(most):
        if now.state is not None:
            block.watch(now.state.running, t)
        graded = [t >= first_graded[b] for b in numbers]
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(graded)):
            if t == 0 or any(t == first_graded[b] for b in numbers):
                now = now._replace(u=block.enter(now.h, now.e, t))
            ending = [counts[b] == t + 1 for b in numbers]
            loop = partial(_loop, block, now.freqs_cis, now.mask, t, ending)
            inputs = (now.h, now.e, now.u, now.state)
            after = checkpoint(loop, *inputs, use_reentrant=False) if checkpoint_loops else loop(*inputs)
            now = now._replace(h=after[0], state=after[1], u=after[2])
            if torch.is_grad_enabled() and not all(graded):
                now = _detached(now, torch.tensor(graded, device=h.device))
        if grad_loops is not None and t + 1 in first_graded:
            torch.clear_autocast_cache()  # it holds weights cast without gradients
        if t == most - 1:
            break
        if not same or (act and trim):
            now, numbers = _leave(now, numbers, ending, collected, act and trim, distributed)
        if not distributed:
            if not numbers:
                break
            if act and not trim:  # else what has halted has left
                counter.record(now.state.running.sum().reshape(1))
                if counter.finished():
                    break
        elif agree and not _any_rank(now):
            break
    if now.h.shape == h.shape:  # nobody has left early
        return (now.h, None) if now.state is None else (now.state.h_out, now.state.ponder)
    if numbers:
        _collect(collected, now, torch.arange(len(numbers), device=h.device), 0)
    return collected.whole()


def _loop(block, freqs_cis, mask, t: int, ending: list[bool], h, e, u, state):
    """Loop t; `ending` says whose last it is."""
    f = block.block(u, freqs_cis, mask, None, LOOP_KEY.format(t))
    if all(ending) or not any(ending):
        return block.step(h, e, u, f, state, t, all(ending))
    # The last loop's step may differ (act_remainder="last"): both kinds, each on its sequences.
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
    return join(h0, h1), joined, join(u0, torch.zeros_like(h1))  # nothing follows: whatever stands in u is not used


def _detached(now: Batch, graded: Tensor) -> Batch:
    """Cuts the gradients of sequences that are still in their loops without."""

    def cut(x: Tensor) -> Tensor:
        return torch.where(graded.view(-1, *[1] * (x.dim() - 1)), x, x.detach()) if x.is_floating_point() else x

    return now._replace(h=cut(now.h), state=None if now.state is None else ACTState(*map(cut, now.state)))


def _collect(collected: Collected, now: Batch, keep: Tensor, first: int) -> None:
    """Adds the results of sequences `keep` from position `first` on."""
    result = now.h if now.state is None else now.state.h_out
    pick = partial(torch.index_select, dim=0, index=keep)
    ponder = None if now.state is None else pick(now.state.ponder)[:, first:]
    collected.add(now.rows[keep], first, pick(result)[:, first:], ponder)


def _leave(now: Batch, numbers, ending, collected: Collected, halted_too: bool, stay: bool) -> tuple[Batch, list[int]]:
    """Sends away what has nothing left to do. With `stay` (other ranks run on) one position of one sequence remains."""
    tokens = now.h.shape[1]
    gone, length = list(ending), tokens
    if halted_too:
        running = now.state.running
        reach = (running.any(0) * torch.arange(1, tokens + 1, device=running.device)).amax()
        *rows, reach = torch.cat((running.any(1).long(), reach.reshape(1))).tolist()  # the host waits once
        gone = [g or not r for g, r in zip(gone, rows)]
        if can_cut_positions(now.mask):
            length = max(reach, 1)
    kept = [i for i, g in enumerate(gone) if not g]
    if not kept and stay:
        kept = [0]
    if not any(ending) and kept and len(kept) * length > (1 - threshold("early_exit_share")) * len(numbers) * tokens:
        return now, numbers
    device = now.h.device
    left = torch.tensor([i for i in range(len(numbers)) if i not in set(kept)], dtype=torch.int64, device=device)
    keep = torch.tensor(kept, dtype=torch.int64, device=device)
    if len(left):
        _collect(collected, now, left, 0)
    if kept and length < tokens:
        _collect(collected, now, keep, length)
    return now.take(keep, length), [numbers[i] for i in kept]


def _any_rank(now: Batch) -> bool:
    """Whether a position runs on any rank: the ranks leave the loop together."""
    flag = now.state.running.any().to(torch.int32) if now.state is not None else torch.ones((), dtype=torch.int32)
    flag = flag.reshape(1)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
