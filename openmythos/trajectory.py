"""The trajectory of a forward: the state after every loop, its halting probability, and what is predicted from it.

    seen = model(ids, n_loops=8, return_trajectory=True)
    seen.by_loop(seen.output).argmax(-1)  # (8, B, T), the likeliest token after each loop

Nothing halts in such a call, whatever the configuration says: every sequence runs all of its loops. All but `loop` and
`sequence` has gradients, of the states in the loops that `grad_loops` leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Trajectory(NamedTuple):
    """States of a forward, a row for each loop of each sequence: R rows, those of the first loop in front.

    Sequences may run different numbers of loops. If all run n, R = n * B, and row t * B + b is loop t of sequence b.

    Attributes:
        states: (R, T, dim), after the loop.
        halting: (R, T) float32 or float64, the halting probability that `ACTHalting` gives to the state.
        loop, sequence: (R,) int64, counted from 0.
        output: (R, T, ...): of a model's forward logits, or the head's input with return_hidden; of a recurrent block's
            what the coda reads.
    """

    states: Tensor
    halting: Tensor
    loop: Tensor
    sequence: Tensor
    output: Tensor

    def by_loop(self, x: Tensor) -> Tensor:
        """(R, ...) -> (loops, B, ...), zeros where a sequence runs no such loop."""
        whole = x.new_zeros(int(self.loop[-1]) + 1, int(self.sequence.max()) + 1, *x.shape[1:])
        return whole.index_put((self.loop, self.sequence), x)


class Recorder:
    """Collects the states of a loop, with the numbers of their sequences in the whole batch."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._sequences: list[Tensor] = []

    def add(self, h: Tensor, sequences: Tensor | None) -> None:
        """States (b, T, dim) after the next loop; sequences (b,) int64, ascending. None: all are still there."""
        sequences = torch.arange(len(h), device=h.device) if sequences is None else sequences
        if len(sequences):  # else it runs for other ranks alone
            self._states.append(h)
            self._sequences.append(sequences)

    def trajectory(self, act: Callable[[Tensor], Tensor], readout: Callable[[Tensor], Tensor]) -> Trajectory:
        """What was collected; `act` and `readout` are a recurrent block's."""
        states, sequence = torch.cat(self._states), torch.cat(self._sequences)
        rows = torch.tensor([len(h) for h in self._states], device=states.device)
        loop = torch.arange(len(self._states), device=states.device).repeat_interleave(rows)
        return Trajectory(states, act(states), loop, sequence, readout(states))


def joined(sequences: Sequence[Trajectory]) -> Trajectory:
    """One trajectory from those of single sequences."""
    device = sequences[0].loop.device
    number = torch.arange(len(sequences), device=device)
    rows = torch.tensor([len(one.loop) for one in sequences], device=device)
    whole = Trajectory(*map(torch.cat, zip(*sequences)))._replace(sequence=number.repeat_interleave(rows))
    order = whole.loop.argsort(stable=True)
    return Trajectory(*(x.index_select(0, order) for x in whole))
