"""Who decides that a token in the loop halts: the model's ACT, or a rule of the request."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.exits import ACT, ExitRule, Look
from openmythos_kernels.serve.rows import Rows
from openmythos_kernels.serve.sequences import Sequences


def mode(rule: ExitRule | None, halting: str) -> tuple[bool, bool]:
    """Whether ACT is computed for a request's tokens, and whether those that ACT halts stop."""
    if rule is None:
        return halting != "off", halting == "freeze"
    return isinstance(rule, ACT), True


def decides(rule: ExitRule) -> bool:
    """Whether a rule decides, not ACT."""
    return not isinstance(rule, ACT)


class Decision:
    """A rule on tokens of one request that have entered the loop together.

    Args:
        at: (n,) int64, where they are in the engine's rows.
    """

    def __init__(self, rule: ExitRule, rows: Rows, at: Tensor):
        self._rule, self._all = rule, at
        self._running = torch.ones_like(at, dtype=torch.bool)
        self._memory = rule.start(rows.h[at])  # of those that still run

    def ask(self, rows: Rows, before: Tensor, sequences: Sequences) -> None:
        """After a loop: what the rule halts has reached its limit. `before`: the states before the loop."""

        def predict(states: Tensor, coda: bool) -> Tensor:
            if coda:  # of halted tokens too: others attend to them
                states = sequences.leave(rows.h[self._all], rows.tokens(self._all))[self._running]
            return sequences.logits(states)

        at = self._all[self._running]
        t = int(rows.loop[at[0]]) - 1
        look = Look(t, before[at], rows.h[at], sequences.weights.act, predict)
        halts, memory = self._rule.halts(look, self._memory)
        rows.limit[at[halts]] = t + 1
        self._running[self._running.clone()] = ~halts
        self._memory = tuple(x[~halts] for x in memory)
