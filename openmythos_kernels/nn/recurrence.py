"""Drop-in recurrent block: lists of paths for the loops, for a loop's step and for what the block reads in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

import openmythos
from openmythos import debug
from openmythos.attention import Mask
from openmythos.exits import Exit
from openmythos.recurrence import ACTState, Loops
from openmythos_kernels.nn.call import EnterCall, LoopCall, StepCall
from openmythos_kernels.nn.norms import normed
from openmythos_kernels.nn.paths import (
    decode_loop,
    decode_rows,
    early_exit,
    fused_enter,
    fused_halting,
    fused_step,
    looped,
    packed_rows,
    parcae_enter,
    reference,
    walk,
)
from openmythos_kernels.runtime.backends import Choice


class RecurrentBlock(openmythos.RecurrentBlock):
    """`openmythos.RecurrentBlock`, same parameters and numbers, with the fused step.

    Attributes:
        trim: whether what has halted stops being computed: with halting="evolve" and without a cache, halted sequences
            and the positions behind the last running one; with "freeze", every halted position. Exact; the shapes
            inside the loop then depend on data.
        agree: in a group of several ranks, whether they leave the loop together once nothing runs on any of them (one
            all-reduce of a flag a loop). Otherwise every rank runs all loops.
    """

    trim: bool = True
    agree: bool = False
    paths = (decode_loop, decode_rows, packed_rows, early_exit, looped, reference)
    step_paths = (fused_step, fused_halting, reference)
    enter_paths = (fused_enter, parcae_enter, reference)

    def backend(self, states: tuple[Tensor, ...] = ()) -> Choice:
        """What a step of this block runs on, and why not on something faster.

        Args:
            states: h, e and the block's output; without them only the module itself is judged.
        """
        return fused_step.choice(self, states)

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
        """As `openmythos.RecurrentBlock.forward`, without computing what has halted where that changes nothing."""
        arguments = h, e, freqs_cis, mask, n_loops, kv_cache, return_ponder, grad_loops, checkpoint_loops
        found = walk(self.paths, LoopCall(self, *arguments, exit, predict, return_trajectory))
        if debug.on:  # paths in C++ have no driver that looks at every loop
            debug.check_states("after all loops", found[0] if return_ponder or return_trajectory else found)
        return found

    def reference(self, call: LoopCall):
        """The call by `openmythos.RecurrentBlock`, over this block's steps."""
        return super().forward(*call.arguments)

    def step(
        self, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state: ACTState | None, t: int, last: bool
    ) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """As `openmythos.RecurrentBlock.step`."""
        return walk(self.step_paths, StepCall(self, h, e, u, f, state, t, last))

    def reference_step(self, call: StepCall) -> tuple[Tensor, ACTState | None, Tensor | None]:
        """The step by `openmythos.RecurrentBlock`."""
        return super().step(call.h, call.e, call.u, call.f, call.state, call.t, call.last)

    def prepare(self, e: Tensor) -> Tensor:
        """As `openmythos.RecurrentBlock.prepare`."""
        return self.injection.prepare(e, partial(normed, self.norm))

    def enter(self, h: Tensor, e: Tensor, t: int) -> Tensor:
        """As `openmythos.RecurrentBlock.enter`."""
        return walk(self.enter_paths, EnterCall(self, h, e, t))

    def reference_enter(self, call: EnterCall) -> Tensor:
        """The block's input by `openmythos.RecurrentBlock`."""
        return super().enter(call.h, call.e, call.t)
