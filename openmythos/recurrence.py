"""The recurrent block: one transformer block, looped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from openmythos.attention import Mask
from openmythos.block import make_core
from openmythos.compat import capturing, fake_mode_active
from openmythos.config import MythosConfig, is_row, setting, whole_number
from openmythos.exits import ACT, Exit, ExitRule, ExitState, exit_rule
from openmythos.halting import ACTHalting, ACTState, act_update
from openmythos.injection import make_injection
from openmythos.layers import RMSNorm, recomputing
from openmythos.loop import Carry, LoopDriver
from openmythos.lora import LoRAAdapter
from openmythos.trajectory import Recorder, joined

__all__ = [
    "ACTHalting",
    "ACTState",
    "LoRAAdapter",
    "Loops",
    "RecurrentBlock",
    "act_update",
    "check_arguments",
    "initial_state",
    "resolve_loops",
]

Loops = int | list[int] | None


class RecurrentBlock(nn.Module):
    """A transformer block that is looped, with input injection and a halting decision per position.

        e = injection.prepare(e)
        for t in range(n_loops):
            u = injection.enter(h, e, t)
            f = block(u)
            f = f + lora(f, t)
            h = injection.update(h, e, u, f)
            state = act_update(state, h, act(h))    # adds to the output, halts positions
        return injection.readout(state.h_out)

    `forward` prepares and reads out, `LoopDriver.run` is the loop, and `step` is what follows the block in its body.

    Attributes:
        watchers: functions (running, t), called before loop t of every forward with ACT; running is bool (b, t), the
            positions still computed that have not halted. A forward that the backward pass runs again calls none.
        ranks_may_part: whether ranks may run different numbers of loops: `openmythos.parallel` sets it where no
            collective is left in the loop or ranks that are done go on serving the others.
        scores: set while `openmythos.balance.recording_scores` is on: then every position runs all loops.
    """

    watchers: tuple[Callable[[Tensor, int], None], ...] = ()
    ranks_may_part: bool = False
    scores: Any = None

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        self.cfg = cfg
        self.block = make_core(cfg)
        self.injection = make_injection(cfg)
        self.act = ACTHalting(cfg.dim)
        if halt_bias := setting(cfg, "halt_bias"):
            nn.init.constant_(self.act.halt.bias, halt_bias)
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim) if self.injection.uses_norm else nn.Identity()

    def initial_state(self, e: Tensor) -> Tensor:
        """The state before the first loop, (B, T, dim), by `cfg.h0`."""
        return initial_state(self.cfg, e)

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        freqs_cis: Tensor,
        mask: Mask = None,
        n_loops: Loops = None,
        kv_cache: dict | None = None,
        return_ponder: bool = False,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
        exit: Exit = None,
        predict: Callable[[Tensor, bool], Tensor] | None = None,
        return_trajectory: bool = False,
    ):
        """
        Args:
            h: state before the first loop, (B, T, dim); upstream passes e.
            e: the prelude's output, injected in every loop, (B, T, dim).
            freqs_cis, mask, kv_cache: as for the attention; every loop has its own cache entry.
            n_loops: loops at most; None means cfg.max_loop_iters. May exceed it. A list gives every sequence its own.
            return_ponder: also return the ponder cost N + R of each position, (B, T), for a loss term.
            grad_loops: truncated backpropagation: only the last grad_loops loops have gradients.
            checkpoint_loops: keep only the inputs of each loop for the backward pass, which runs the loop again.
            exit: who decides that a position halts, and freezes: a name of `openmythos.exits.EXITS`, a rule, or a
                function (t, before, after) -> bool (B, T). None is the configured halting.
            predict: (state, through the coda?) -> logits, for rules that read predictions.
            return_trajectory: return a `Trajectory` instead, of a run in which nothing halts.

        Returns:
            ACT's weighted sum of the states (the last state with halting="off" or another exit than "act"), of shape
            (B, T, dim); with return_ponder a pair.

        Raises:
            ValueError: if n_loops or grad_loops is below 1, return_ponder is set without ACT, a list of loop numbers or
                checkpoint_loops comes with a cache, exit is no rule, or return_trajectory comes with a cache, an exit
                or return_ponder.
        """
        n_loops, exit = resolve_loops(n_loops, self.cfg, len(h)), exit_rule(exit)
        check_arguments(self.cfg, kv_cache, return_ponder, grad_loops, checkpoint_loops, exit, return_trajectory)
        if isinstance(n_loops, list):
            if kv_cache is not None:
                raise ValueError(f"n_loops = {n_loops}: with a kv_cache all sequences run the same number of loops")
            options: tuple[Any, ...] = return_ponder, grad_loops, checkpoint_loops, exit, predict, return_trajectory
            rows = []
            for b, n in enumerate(n_loops):
                if self.scores is not None:
                    self.scores.only = b
                # Not by __call__: hooks see one call, and FSDP gathers and reduces once.
                rows.append(self.forward(h[b : b + 1], e[b : b + 1], *_row(freqs_cis, mask, b), n, None, *options))
            if self.scores is not None:
                self.scores.only = None
            if return_trajectory:
                return joined(rows)
            return tuple(map(torch.cat, zip(*rows))) if return_ponder else torch.cat(rows)
        recorder = Recorder() if return_trajectory else None
        freezes, rule, state = (False, None, None) if return_trajectory else self.halting(h, exit)
        may_stop = state is not None and (kv_cache is None or freezes) and _free_to_exit(h)
        may_stop = may_stop and self.scores is None and not self.in_step(predict)
        e = self.prepare(e)
        options = may_stop, freezes, rule, predict, recorder
        end = LoopDriver(self, n_loops, grad_loops, checkpoint_loops, kv_cache, *options).run(
            Carry(h, e, None, state, freqs_cis, mask)
        )
        if recorder is not None:
            return recorder.trajectory(self.act, self.injection.readout)
        if not isinstance(end.state, ACTState):
            return self.injection.readout(end.h)
        out = self.injection.readout(end.state.h_out)
        return (out, end.state.ponder) if return_ponder else out

    def halting(self, h: Tensor, exit: ExitRule | None) -> tuple[bool, ExitRule | None, ACTState | ExitState | None]:
        """Whether halted positions freeze, what decides in ACT's place (None: ACT), and the state before the first
        loop."""
        if exit is not None and not isinstance(exit, ACT):
            return True, exit, ExitState.start(exit, h)
        configured = setting(self.cfg, "halting")
        if exit is None and configured == "off":
            return False, None, None
        return exit is not None or configured == "freeze", None, ACTState.start(h)

    def in_step(self, predict: Callable | None) -> bool:
        """Whether all ranks must run the same loops: under FSDP every loop may have collectives, and a rank that stops
        early hangs the others. `predict` calls other blocks between two loops."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and not (self.ranks_may_part and predict is None)

    def watch(self, running: Tensor, t: int) -> None:
        """Calls the watchers, unless the backward pass is running this forward again."""
        if self.watchers and not recomputing():
            for watcher in self.watchers:
                watcher(running, t)

    def prepare(self, e: Tensor) -> Tensor:
        """What the loops are given for e, (B, T, dim), once before the first."""
        return self.injection.prepare(e, self.norm)

    def enter(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        """What the block reads in loop t, (B, T, dim)."""
        return self.injection.enter(h, e, t, self.norm)

    def step(
        self, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state: ACTState | None, t: int, last: bool
    ) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """All of loop t behind the block: (h, block output f) -> (h', ACT state', the block's input in loop t + 1).

        In the `last` loop there is no next input, and act_remainder="last" spends the remainder.
        """
        if self.lora is not None:
            f = f + self.lora(f, t)
        new = self.injection.update(h, e, u, f)
        if state is not None:
            spend_remainder = last and setting(self.cfg, "act_remainder") == "last"
            state = act_update(state, new, self.act(new), t, self.cfg.act_threshold, spend_remainder)
        return new, state, None if last else self.enter(new, e, t + 1)


def initial_state(cfg: MythosConfig, e: Tensor) -> Tensor:
    """See `RecurrentBlock.initial_state`."""
    kind = setting(cfg, "h0")
    if kind == "e":
        return e
    h = torch.zeros_like(e)
    return h if kind == "zeros" else nn.init.trunc_normal_(h, std=0.02, a=-0.06, b=0.06)


@overload
def resolve_loops(n_loops: int | None, cfg: MythosConfig, batch: int = 1) -> int: ...


@overload
def resolve_loops(n_loops: Loops, cfg: MythosConfig, batch: int = 1) -> int | list[int]: ...


def resolve_loops(n_loops: Any, cfg: MythosConfig, batch: int = 1) -> int | list[int]:
    """The number of loops to run, or a list with one per sequence.

    Raises:
        ValueError: for a number below 1 (upstream takes 0 for the default), or not one number per sequence.
    """
    if n_loops is None:
        return int(cfg.max_loop_iters)
    several = is_row(n_loops)
    each: list[Any] = [whole_number(n) for n in (n_loops if several else [n_loops])]
    if not all(n is not None and n >= 1 for n in each):
        raise ValueError(
            f"n_loops = {n_loops!r}: must be an integer >= 1, or None for the configured {cfg.max_loop_iters}"
        )
    if several and len(each) != batch:
        raise ValueError(f"n_loops = {n_loops!r}: one per sequence, of which there are {batch}")
    return each if several else each[0]


def check_arguments(
    cfg: MythosConfig,
    kv_cache,
    return_ponder: bool,
    grad_loops,
    checkpoint_loops: bool,
    exit: ExitRule | None = None,
    return_trajectory: bool = False,
) -> None:
    """Checks that a recurrent block's arguments go together.

    Raises:
        ValueError: naming the argument.
    """
    if return_trajectory and (kv_cache is not None or exit is not None or return_ponder):
        raise ValueError("return_trajectory = True: not with a kv_cache, an exit or return_ponder: nothing halts in it")
    halting = "off" if return_trajectory else setting(cfg, "halting")
    if return_ponder and (halting == "off" if exit is None else not isinstance(exit, ACT)):
        raise ValueError('return_ponder = True: there is no ponder cost with halting="off" or an exit other than "act"')
    if grad_loops is not None and ((graded := whole_number(grad_loops)) is None or graded < 1):
        raise ValueError(f"grad_loops = {grad_loops!r}: must be an integer >= 1, or None for all loops")
    if checkpoint_loops and (kv_cache is not None or exit is not None or halting == "freeze"):
        raise ValueError(
            'checkpoint_loops = True: not with a kv_cache, halting="freeze" or an exit: keys outlive a loop'
        )


def _row(freqs_cis: Tensor, mask: Mask, b: int) -> tuple[Tensor, Mask]:
    """freqs_cis and mask of sequence b."""
    freqs_cis = freqs_cis[b : b + 1] if freqs_cis.dim() == 3 else freqs_cis
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[b : b + 1]
    return freqs_cis, mask


def _free_to_exit(h: Tensor) -> bool:
    """Whether the number of loops may depend on data: not in a graph that is compiled, traced or captured, nor on fake
    tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or h.is_meta or fake_mode_active(h):
        return False
    return not capturing(h.device)
