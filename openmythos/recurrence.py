"""The loop: depth-wise LoRA, ACT halting and the recurrent block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.attention import Mask
from openmythos.block import make_core
from openmythos.cache import LOOP_KEY, FrozenKeys
from openmythos.compat import fake_mode_active
from openmythos.config import MythosConfig, setting, whole_number
from openmythos.injection import make_injection
from openmythos.layers import RMSNorm, at_least_fp32, recomputing

Loops = Union[int, list[int], None]


class LoRAAdapter(nn.Module):
    """Depth-wise LoRA (Bae et al., 2024): `(down(x) * scale[t]) @ B`, one scale vector per loop."""

    def __init__(self, dim: int, rank: int, max_loops: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.B = nn.Parameter(torch.randn(rank, dim) * 0.02)
        self.scale = nn.Embedding(max_loops, rank)

    def hidden(self, x: Tensor, loop_t: int) -> Tensor:
        """The low-rank coordinates, scaled for this loop: (..., dim) -> (..., rank)."""
        # Loops past the trained depth go on with the last trained scale.
        last = self.scale.num_embeddings - 1
        return self.down(x) * self.scale(torch.full((), min(loop_t, last), device=x.device))

    def forward(self, x: Tensor, loop_t: int) -> Tensor:
        return self.hidden(x, loop_t) @ self.B


class ACTHalting(nn.Module):
    """Adaptive computation time (Graves, 2016): a halting probability per position."""

    def __init__(self, dim: int):
        super().__init__()
        self.halt = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, dim) -> probability (B, T), in float32 or wider whatever h is."""
        halt = self.halt
        plain = type(halt) is nn.Linear and type(halt.weight) in (nn.Parameter, Tensor)
        if not plain or halt._forward_pre_hooks or halt._forward_hooks:
            return torch.sigmoid(halt(h)).squeeze(-1)  # an adapter, or whatever else stands there
        wide = at_least_fp32(h)
        # Not a Linear call: autocast would take it to low precision.
        logit = (wide * self.halt.weight[0]).sum(-1) + self.halt.bias
        return torch.sigmoid(logit)


class ACTState(NamedTuple):
    """ACT's bookkeeping between loops; all (B, T) but h_out."""

    h_out: Tensor  # (B, T, dim): weighted sum of the states so far
    cumulative_p: Tensor  # halting probability used up so far, float32 or wider
    running: Tensor  # bool: not halted yet
    ponder: Tensor  # N + R: loops run plus remainder, float32 or wider

    @staticmethod
    def start(h: Tensor) -> ACTState:
        zero = at_least_fp32(h.new_zeros(h.shape[:2]))
        return ACTState(torch.zeros_like(h), zero, torch.ones_like(zero, dtype=torch.bool), zero)


class RecurrentBlock(nn.Module):
    """A block looped up to n_loops times, with input injection and per-position halting.

    Attributes:
        watchers: functions of (running, t), called before loop t of every forward with ACT: which of the positions that
            are still computed have not halted, bool (b, t). They see a forward once, also where the backward runs it
            again.
    """

    watchers: tuple[Callable[[Tensor, int], None], ...] = ()

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        self.cfg = cfg
        self.block = make_core(cfg)
        self.injection = make_injection(cfg)
        self.act = ACTHalting(cfg.dim)
        self.lora = LoRAAdapter(cfg.dim, cfg.lora_rank, cfg.max_loop_iters) if cfg.lora_rank else None
        self.norm = RMSNorm(cfg.dim) if self.injection.uses_norm else nn.Identity()

    def initial_state(self, e: Tensor) -> Tensor:
        """The state before the first loop, by `cfg.h0`."""
        kind = setting(self.cfg, "h0")
        if kind == "e":
            return e
        h = torch.zeros_like(e)
        return h if kind == "zeros" else nn.init.trunc_normal_(h, std=0.02, a=-0.06, b=0.06)

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
    ):
        """
        Args:
            h: state before the first loop, (B, T, dim); upstream's is e.
            e: the prelude's output, injected in every loop, (B, T, dim).
            freqs_cis, mask, kv_cache: as for the attention; every loop has its own cache entry.
            n_loops: loops at most; None means cfg.max_loop_iters. May exceed it. A list gives every sequence its own.
            return_ponder: also return the ponder cost N + R per position, (B, T), for a loss term.
            grad_loops: truncated backpropagation: only the last so many of n_loops loops have gradients.
            checkpoint_loops: keep only each loop's inputs for the backward pass, and run the loop again there.

        Returns:
            ACT's weighted sum of the states (the last state with halting="off"), (B, T, dim).

        Raises:
            ValueError: n_loops or grad_loops below 1, ponder cost asked for without ACT, a list of loop numbers or
                checkpointing with a cache.
        """
        n_loops = resolve_loops(n_loops, self.cfg, len(h))
        halting = setting(self.cfg, "halting")
        check_arguments(self.cfg, kv_cache, return_ponder, grad_loops, checkpoint_loops)
        if isinstance(n_loops, list):
            if kv_cache is not None:
                raise ValueError(f"n_loops = {n_loops}: with a kv_cache all sequences run the same number of loops")
            rows = [
                self(
                    h[b : b + 1],
                    e[b : b + 1],
                    *_row(freqs_cis, mask, b),
                    n,
                    None,
                    return_ponder,
                    grad_loops,
                    checkpoint_loops,
                )
                for b, n in enumerate(n_loops)
            ]
            return tuple(map(torch.cat, zip(*rows))) if return_ponder else torch.cat(rows)
        may_exit = halting != "off" and kv_cache is None and _free_to_exit(h)
        state = None if halting == "off" else ACTState.start(h)
        frozen = None
        graded_from = 0 if grad_loops is None else n_loops - int(grad_loops)

        e = self.injection.prepare(e, self.norm)
        u = None
        for t in range(n_loops):
            if state is not None:
                self.watch(state.running, t)
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= graded_from):
                if t == 0 or t == graded_from:
                    u = self.enter(h, e, t)  # anew where gradients begin
                key = LOOP_KEY.format(t)
                cache = kv_cache
                if halting == "freeze":
                    cache = frozen = FrozenKeys(kv_cache, key, state.running, frozen.kept if frozen else None)
                last = t == n_loops - 1
                loop = partial(self._loop, freqs_cis, mask, cache, key, t, last)
                h, state, u = (
                    checkpoint(loop, h, e, u, state, use_reentrant=False) if checkpoint_loops else loop(h, e, u, state)
                )
            if t == graded_from - 1:
                torch.clear_autocast_cache()  # it holds weights cast without gradients
            if may_exit and not last and not state.running.any():
                break
        out = self.injection.readout(h if state is None else state.h_out)
        return (out, state.ponder) if return_ponder else out

    def _loop(self, freqs_cis, mask, cache, key, t, last, h, e, u, state):
        """Loop t, block and update."""
        return self.step(h, e, u, self.block(u, freqs_cis, mask, cache, key), state, t, last)

    def watch(self, running: Tensor, t: int) -> None:
        """Tells the watchers, unless this forward is one that the backward runs again."""
        if self.watchers and not recomputing():
            for watcher in self.watchers:
                watcher(running, t)

    def enter(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        """What the block reads in loop t."""
        return self.injection.enter(h, e, t, self.norm)

    def step(
        self, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state: ACTState | None, t: int, last: bool
    ) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """Everything of loop t but the block: (h, block output f) -> (h', ACT state', input of the next loop).

        `last` says that no loop follows: nothing is made for a next one, and act_remainder="last" spends the rest.
        """
        if self.lora is not None:
            f = f + self.lora(f, t)
        new = self.injection.update(h, e, u, f)
        if setting(self.cfg, "halting") == "freeze":
            new = torch.where(state.running.unsqueeze(-1), new, h)
        if state is not None:
            spend_remainder = last and setting(self.cfg, "act_remainder") == "last"
            state = act_update(state, new, self.act(new), t, self.cfg.act_threshold, spend_remainder)
        return new, state, None if last else self.enter(new, e, t + 1)


def act_update(state: ACTState, h: Tensor, p: Tensor, t: int, threshold: float, spend_remainder: bool) -> ACTState:
    """ACT's bookkeeping for loop t.

    A running position adds p * h; the one that crosses the threshold (or any, with `spend_remainder`) adds
    all the weight that is left instead, and halts. Halted positions add nothing.
    """
    left = 1.0 - state.cumulative_p
    crossed = state.cumulative_p + p >= threshold
    weight = (left.clamp(min=0) if spend_remainder else torch.where(crossed, left.clamp(min=0), p)) * state.running
    h_out = (state.h_out + weight.unsqueeze(-1) * h).to(h.dtype)
    # N = t + 1 loops run so far; R is what was left before the last of them.
    ponder = torch.where(state.running, t + 1 + left, state.ponder)
    cumulative_p = state.cumulative_p + p * state.running
    return ACTState(h_out, cumulative_p, state.running & (cumulative_p < threshold), ponder)


def resolve_loops(n_loops: Loops, cfg: MythosConfig, batch: int = 1) -> int | list[int]:
    """The number of loops to run, or one per sequence; upstream reads 0 as "the default", here it is an error."""
    if n_loops is None:
        return int(cfg.max_loop_iters)
    several = not isinstance(n_loops, int) and hasattr(n_loops, "__len__") and getattr(n_loops, "ndim", 1) == 1
    each = [whole_number(n) for n in (n_loops if several else [n_loops])]
    if not all(n is not None and n >= 1 for n in each):
        raise ValueError(
            f"n_loops = {n_loops!r}: must be an integer >= 1, or None for the configured {cfg.max_loop_iters}"
        )
    if several and len(each) != batch:
        raise ValueError(f"n_loops = {n_loops!r}: one per sequence, of which there are {batch}")
    return each if several else each[0]


def check_arguments(cfg: MythosConfig, kv_cache, return_ponder: bool, grad_loops, checkpoint_loops: bool) -> None:
    """The rules between a recurrent block's arguments.

    Raises:
        ValueError: naming the argument.
    """
    halting = setting(cfg, "halting")
    if return_ponder and halting == "off":
        raise ValueError('return_ponder = True: there is no ponder cost with halting="off"')
    if grad_loops is not None and ((graded := whole_number(grad_loops)) is None or graded < 1):
        raise ValueError(f"grad_loops = {grad_loops!r}: must be an integer >= 1, or None for all loops")
    if checkpoint_loops and (kv_cache is not None or halting == "freeze"):
        raise ValueError('checkpoint_loops = True: not with a kv_cache or halting="freeze", whose keys outlive a loop')


def _row(freqs_cis: Tensor, mask: Mask, b: int) -> tuple[Tensor, Mask]:
    """Rotary rows and mask of sequence b."""
    freqs_cis = freqs_cis[b : b + 1] if freqs_cis.dim() == 3 else freqs_cis
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[b : b + 1]
    return freqs_cis, mask


def _free_to_exit(h: Tensor) -> bool:
    """Whether the number of loops may depend on data: not in a compiled or traced graph or on fake tensors, and not
    where other ranks take part in every loop's collectives (under FSDP an early exit on one rank hangs the rest)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or h.is_meta or fake_mode_active(h):
        return False
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
