"""The loop driver: which loops run, which of them have gradients, and what each reads and keeps.

`RecurrentBlock` says what one loop computes. The driver owns everything around it: gradient truncation, activation
checkpointing, cache keys, frozen keys, watchers and the early stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos import debug
from openmythos.attention import Mask
from openmythos.cache import LOOP_KEY, kept_loops, ragged_cache, reopen
from openmythos.exits import ExitRule, Look, after_loop
from openmythos.frozen import FrozenKeys
from openmythos.halting import ACTState
from openmythos.trajectory import Recorder


class Carry(NamedTuple):
    """What one loop hands to the next; (B, T, dim) each where not said otherwise."""

    h: Tensor  # the recurrent state
    e: Tensor  # the injected input, the same in every loop
    u: Tensor | None  # the block's input; None before the first loop and after the last
    state: Any  # ACTState, ExitState where an exit rule decides, None where nothing halts
    freqs_cis: Tensor  # as for the attention
    mask: Mask


class LoopDriver:
    """Runs loops 0 .. n_loops - 1 of a recurrent block on a batch that stays whole.

    A subclass whose batch shrinks overrides `gradients_from`, `sequences`, `body`, `remaining` and `finished`.

    Args:
        block: the `RecurrentBlock`.
        n_loops: loops at most.
        grad_loops: how many of the last loops have gradients; None means all.
        checkpoint_loops: keep only the inputs of each loop for the backward pass, which runs the loop again.
        kv_cache: mapping with one entry per attention layer and loop, or None.
        may_stop: whether to stop once every position has halted.
        freezes: whether halted positions keep their state and keys.
        rule: what decides in ACT's place which positions halt, or None.
        predict: as of `exits.Look`, for rules that read predictions.
        recorder: is given the states after every loop, or None.
    """

    def __init__(
        self,
        block,
        n_loops: int,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
        kv_cache: dict | None = None,
        may_stop: bool = False,
        freezes: bool = False,
        rule: ExitRule | None = None,
        predict: Callable[[Tensor, bool], Tensor] | None = None,
        recorder: Recorder | None = None,
    ):
        self.block = block
        self.n_loops = n_loops
        self.first_with_gradients = first_with_gradients(n_loops, grad_loops)
        self.checkpoint_loops = checkpoint_loops
        self.kv_cache = kv_cache
        self.may_stop = may_stop
        self.freezes, self.rule, self.predict, self.recorder = freezes, rule, predict, recorder
        ragged = ragged_cache(kv_cache) if freezes and kv_cache is not None else None
        self.frozen = FrozenKeys(ragged) if freezes else None

    def run(self, x: Carry) -> Carry:
        """All loops, from the carry before the first to the carry after the last that ran."""
        debug.check_states("before the first loop", x.e)
        for t in range(self.n_loops):
            if x.state is not None:
                self.block.watch(x.state.running, t)
            starts = self.gradients_from()
            if self.block.scores is not None:
                self.block.scores.enter(self.sequences(), [t >= start for start in starts])
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= min(starts)):
                if t == 0 or t in starts:
                    x = x._replace(u=self.block.enter(x.h, x.e, t))  # again where gradients begin
                key, cache = self.keys(x, t)
                body = self.body(x, cache, key, t)
                act = x.state if isinstance(x.state, ACTState) else None
                if self.checkpoint_loops:
                    h, state, u = checkpoint(body, x.h, x.e, x.u, act, use_reentrant=False)
                else:
                    h, state, u = body(x.h, x.e, x.u, act)
                debug.check_states(f"after loop {t}", h)
                x = self.halted(x._replace(h=h, u=u, state=state), x, t)
                if torch.is_grad_enabled() and t < max(starts):
                    x = _detached(x, torch.tensor([t < start for start in starts], device=h.device))
                if self.recorder is not None:
                    self.recorder.add(x.h, self.sequences())
            if t + 1 in starts:
                torch.clear_autocast_cache()  # in older PyTorch it holds weights cast without gradients
            if t < self.n_loops - 1:
                x = self.remaining(x, t)
                if self.finished(x):
                    break
        self.end()
        return x

    def gradients_from(self) -> Sequence[int]:
        """The first loop with gradients: one number for the whole batch, or one for each sequence."""
        return (self.first_with_gradients,)

    def sequences(self) -> Tensor | None:
        """The places of the batch's sequences in the whole batch, (b,) int64; None if all are there."""
        return None

    def keys(self, x: Carry, t: int) -> tuple[str, Any]:
        """The cache key of loop t's layers, and the cache that they see."""
        kept = kept_loops(self.kv_cache)
        key = LOOP_KEY.format(t % kept if kept and not self.freezes else t)
        if self.frozen is not None:
            return key, self.frozen.enter(key, t, x.state.running)
        if kept and t >= kept and self.kv_cache is not None:
            reopen(self.kv_cache, key, x.h.shape[1])
        return key, self.kv_cache

    def halted(self, x: Carry, before: Carry, t: int) -> Carry:
        """The carry after loop t's body: what had halted `before` it stays as it was, and an exit rule decides."""
        if self.freezes:
            x = x._replace(h=torch.where(before.state.running.unsqueeze(-1), x.h, before.h))
        if self.rule is not None:
            look = Look(t, before.h, x.h, self.block.act, self.predict)
            x = x._replace(state=after_loop(self.rule, before.state, look))
        return x

    def end(self) -> None:
        """After the last loop."""
        if self.frozen is not None:
            self.frozen.commit(self.n_loops)

    def body(self, x: Carry, cache, key: str, t: int) -> Callable:
        """Loop t as a function (h, e, u, state) -> (h', state', u').

        It must not hold the driver: with checkpointing the autograd graph holds the function.
        """
        return partial(_body, self.block, x.freqs_cis, x.mask, cache, key, t, t == self.n_loops - 1)

    def remaining(self, x: Carry, t: int) -> Carry:
        """What the loops after loop t still compute."""
        return x

    def finished(self, x: Carry) -> bool:
        """Whether no further loop is needed."""
        return self.may_stop and x.state is not None and not x.state.running.any()


def first_with_gradients(n_loops: int, grad_loops: int | None) -> int:
    """The first of n_loops loops that has gradients; not positive if all have."""
    return 0 if grad_loops is None else n_loops - int(grad_loops)


def _body(block, freqs_cis: Tensor, mask: Mask, cache, key: str, t: int, last: bool, h, e, u, state) -> tuple:
    return block.step(h, e, u, block.block(u, freqs_cis, mask, cache, key), state, t, last)


def _detached(x: Carry, without: Tensor) -> Carry:
    """Cuts the gradients of the sequences `without`, bool (B,)."""

    def cut(y: Tensor) -> Tensor:
        return torch.where(without.view(-1, *[1] * (y.dim() - 1)), y.detach(), y) if y.is_floating_point() else y

    return x._replace(h=cut(x.h), state=ACTState(*map(cut, x.state)) if isinstance(x.state, ACTState) else x.state)
