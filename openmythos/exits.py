"""Exits: rules that decide after a loop which positions halt, for models trained with ACT and without.

A position that halts freezes (see `halting="freeze"` of the configuration): its state is the recurrent block's output,
and later tokens go on reading its deepest latent. A rule measures how far a position is from being settled, its score,
and halts it once the score is below the rule's limit. `calibrate` chooses the limit.

What a loop costs more with each rule: "head" and "latent" a few products per channel; "kl", "confidence", "entropy" and
"argmax" need predictions, which are the coda and the head in every loop, or the head alone with `coda=False`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.layers import at_least_fp32

Memory = tuple[Tensor, ...]


class Look(NamedTuple):
    """What a rule may look at after loop t. Positions have any shape (...), often (B, T) or (N,)."""

    t: int | Tensor  # of each position, (...), or one for all
    before: Tensor  # (..., dim), the state before the loop
    after: Tensor  # (..., dim), the state after it
    act: Callable[[Tensor], Tensor]  # ACT's halting probability, (..., dim) -> (...)
    predict: Callable[[Tensor, bool], Tensor] | None  # (state, through the coda?) -> logits (..., vocab_size)


class ExitRule:
    """A rule for `exit=`.

    Args:
        limit: a position halts once its score is below this.
        minimum: loops that every position runs at least.
        maximum: loops that every position runs at most; None: those of the call.

    Attributes:
        predicts: whether the rule reads predictions.
        coda: whether predictions go through the coda.
    """

    predicts = False
    coda = True

    def __init__(self, limit: float, minimum: int = 1, maximum: int | None = None):
        self.limit = float(limit)
        self.minimum = checked_integer("minimum", minimum, 1)
        self.maximum = None if maximum is None else checked_integer("maximum", maximum, self.minimum)

    def start(self, states: Tensor) -> Memory:
        """What the rule remembers of each position before the first loop; states (..., dim)."""
        return ()

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        """How unsettled each position is, (...), and what to remember."""
        raise NotImplementedError

    def halts(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        """Which positions halt, bool (...), and what to remember."""
        score, memory = self.score(look, memory)
        ran = look.t + 1
        halts = score < self.limit
        if self.maximum is not None:
            halts = halts | torch.as_tensor(ran >= self.maximum, device=halts.device)
        return halts & torch.as_tensor(ran >= self.minimum, device=halts.device), memory

    def with_limit(self, limit: float) -> ExitRule:
        """The same rule with another limit."""
        other = copy.copy(self)
        other.limit = float(limit)
        return other


class ACT(ExitRule):
    """The model's own ACT, whose threshold is the configuration's; the output is its weighted sum of states."""

    def __init__(self):
        super().__init__(0.0)


class HeadExit(ExitRule):
    """ACT's linear layer as a classifier: halts when its probability exceeds `threshold`."""

    def __init__(self, threshold: float = 0.5, **options: Any):
        super().__init__(1 - threshold, **options)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        return 1 - look.act(look.after), memory


class LatentExit(ExitRule):
    """Halts when the state changes by less than `eps` of its own norm (Geiping et al., 2025, took 0.03)."""

    def __init__(self, eps: float = 0.03, **options: Any):
        super().__init__(eps, **options)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        after = at_least_fp32(look.after)
        change = (after - at_least_fp32(look.before)).norm(dim=-1)
        return change / after.norm(dim=-1).clamp_min(torch.finfo(after.dtype).tiny), memory


class _Predicting(ExitRule):
    """A rule on predictions.

    Args:
        coda: whether the state goes through the coda before the head. Without, a loop costs the head alone.
    """

    predicts = True

    def __init__(self, limit: float, coda: bool = True, **options: Any):
        super().__init__(limit, **options)
        self.coda = bool(coda)

    def logits(self, look: Look) -> Tensor:
        if look.predict is None:
            raise ValueError(f"exit = {type(self).__name__}: reads predictions, which a recurrent block alone has not")
        return at_least_fp32(look.predict(look.after, self.coda))


class KLExit(_Predicting):
    """Halts when the Kullback-Leibler divergence between the predictions of two loops is below `eps` nats."""

    def __init__(self, eps: float = 5e-4, **options: Any):
        super().__init__(eps, **options)

    def start(self, states: Tensor) -> Memory:
        return (at_least_fp32(states.new_zeros(*states.shape[:-1], 1)),)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        now = self.logits(look).log_softmax(-1)
        (before,) = memory
        if before.shape != now.shape:  # nothing to compare with after the first loop
            return now.new_full(now.shape[:-1], math.inf), (now,)
        first = torch.as_tensor(look.t == 0, device=now.device)  # a slot that was given to another token
        divergence = (now.exp() * (now - before)).sum(-1)
        return torch.where(first, math.inf, divergence), (now,)


class ConfidenceExit(_Predicting):
    """Halts when the likeliest token's probability exceeds `threshold`."""

    def __init__(self, threshold: float = 0.9, **options: Any):
        super().__init__(1 - threshold, **options)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        return 1 - self.logits(look).softmax(-1).amax(-1), memory


class EntropyExit(_Predicting):
    """Halts when the prediction's entropy is below `eps` nats."""

    def __init__(self, eps: float = 0.5, **options: Any):
        super().__init__(eps, **options)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        p = self.logits(look).log_softmax(-1)
        return -(p.exp() * p).sum(-1), memory


class ArgmaxExit(_Predicting):
    """Halts when the likeliest token has been the same for `m` loops."""

    def __init__(self, m: int = 3, **options: Any):
        super().__init__(0.5 - checked_integer("m", m, 1), **options)

    def start(self, states: Tensor) -> Memory:
        none = torch.full(states.shape[:-1], -1, dtype=torch.int64, device=states.device)
        return none, torch.zeros_like(none)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        token, count = memory
        now = self.logits(look).argmax(-1)
        first = torch.as_tensor(look.t == 0, device=now.device)
        count = torch.where((now == token) & ~first, count + 1, 1)
        return -count.to(torch.float32), (now, count)


class CallableExit(ExitRule):
    """A function (t, before, after) -> bool (...) that says which positions halt."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]):
        super().__init__(0.5)
        self.function = function

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        halts = self.function(look.t, look.before, look.after)
        if not isinstance(halts, Tensor) or halts.dtype != torch.bool or halts.shape != look.after.shape[:-1]:
            came = f"{halts.dtype} {tuple(halts.shape)}" if isinstance(halts, Tensor) else type(halts).__name__
            raise ValueError(
                f"exit: the function returned {came}, must be a bool tensor of shape {tuple(look.after.shape[:-1])}"
            )
        return 1 - halts.to(torch.float32), memory


EXITS: dict[str, Any] = {
    "act": ACT,
    "head": HeadExit,
    "latent": LatentExit,
    "kl": KLExit,
    "confidence": ConfidenceExit,
    "entropy": EntropyExit,
    "argmax": ArgmaxExit,
}
Exit = str | ExitRule | Callable | None


def exit_rule(exit: Exit) -> ExitRule | None:
    """The rule of an `exit=` argument; None is the model's configured halting.

    Raises:
        ValueError: it is no name of a rule, rule or function.
    """
    if exit is None or isinstance(exit, ExitRule):
        return exit
    if isinstance(exit, str) and exit in EXITS:
        return EXITS[exit]()
    if callable(exit) and not isinstance(exit, type):
        return CallableExit(exit)
    raise ValueError(f"exit = {exit!r}: must be None, one of {', '.join(EXITS)}, an ExitRule or a function")


class ExitState(NamedTuple):
    """What the loop hands on where a rule decides in ACT's place.

    Attributes:
        running: (B, T) bool, the positions that have not halted.
        memory: the rule's, each (B, T, ...).
    """

    running: Tensor
    memory: Memory

    @staticmethod
    def start(rule: ExitRule, h: Tensor) -> ExitState:
        return ExitState(torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device), rule.start(h))


@torch.no_grad()
def after_loop(rule: ExitRule, state: ExitState, look: Look) -> ExitState:
    """The state after loop t; positions that have halted stay halted."""
    halts, memory = rule.halts(look, state.memory)
    return ExitState(state.running & ~halts, memory)
