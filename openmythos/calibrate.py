"""The limit of an exit rule, chosen on held-out text: as much saved as a given loss allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.dropout import without_dropout
from openmythos.exits import ACT, Exit, ExitRule, Look, Memory, exit_rule

# Scores between which the search chooses.
QUANTILES = 64


class Calibration(NamedTuple):
    """What `calibrate` found.

    Attributes:
        rule: the exit rule with the chosen limit, for `exit=`.
        loss, full_loss: nats per token with the rule and with every loop.
        mean_depth: loops that a position ran in the mean with the rule.
        loops: loops that it runs without.
    """

    rule: ExitRule
    loss: float
    full_loss: float
    mean_depth: float
    loops: int


@torch.no_grad()
def calibrate(
    model: Any, data: Iterable[tuple[Tensor, Tensor]], exit: Exit, loss: float = 0.01, n_loops: int | None = None
) -> Calibration:
    """Chooses the largest limit with which a rule raises the loss by no more than `loss`.

    The scores of a run through all loops give the limits to choose from; halving finds one, with about
    log2(QUANTILES) more runs over the data. A larger limit halts earlier, but the loss need not rise evenly: the limit
    that is found meets the bound on this data, and one above it might, too.

    Args:
        model: an OpenMythos.
        data: held-out batches (ids, targets), (B, T) int64 each; a few thousand tokens.
        exit: a name of `openmythos.exits.EXITS` or a rule, with its minimum, maximum and options; its limit is ignored.
        loss: nats per token by which the mean cross entropy may rise.
        n_loops: as for the model.

    Raises:
        ValueError: exit has no limit to choose, loss is negative or data is empty.
    """
    rule, batches = exit_rule(exit), list(data)
    if rule is None or isinstance(rule, ACT):
        raise ValueError(f"exit = {exit!r}: must be a rule with a limit; ACT's threshold belongs to the configuration")
    if not loss >= 0:
        raise ValueError(f"loss = {loss!r}: must be nats >= 0")
    if not batches:
        raise ValueError("data: got no batch, must have at least one")
    seen = _Seen(rule)
    full, loops = _run(model, batches, seen, n_loops)
    scores = torch.cat(seen.scores).double()
    scores = scores[scores.isfinite()]
    limits = scores.quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device=scores.device)).unique()
    best = rule.with_limit(float("-inf")), full, loops
    low, high = 0, len(limits)
    while low < high:
        middle = (low + high) // 2
        tried = rule.with_limit(torch.nextafter(limits[middle], torch.tensor(float("inf")).to(limits)).item())
        found, depth = _run(model, batches, tried, n_loops)
        if found <= full + loss:
            best, low = (tried, found, depth), middle + 1
        else:
            high = middle
    return Calibration(best[0], best[1], full, best[2], round(loops))


def _run(model: Any, batches: list[tuple[Tensor, Tensor]], rule: ExitRule, n_loops: int | None) -> tuple[float, float]:
    """Mean cross entropy in nats, and loops that a position ran in the mean."""
    total, tokens = 0.0, 0
    with without_dropout(model), counting_loops(model) as count:
        for ids, targets in batches:
            logits = model(ids, n_loops=n_loops, exit=rule).flatten(0, 1).float()
            total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
            tokens += targets.numel()
    return total / tokens, count.mean


class LoopCount:
    """How many loops positions have run.

    Attributes:
        ran: loops of all positions. positions: how many there were.
    """

    def __init__(self) -> None:
        self.ran = self.positions = 0

    def __call__(self, running: Tensor, t: int) -> None:
        self.ran += int(running.sum())
        self.positions += running.numel() if t == 0 else 0

    @property
    def mean(self) -> float:
        """Loops that a position ran in the mean; NaN if nothing could halt."""
        return self.ran / self.positions if self.positions else float("nan")


@contextmanager
def counting_loops(model: Any) -> Iterator[LoopCount]:
    """A context that counts the loops of positions, in forwards of an OpenMythos in which positions may halt."""
    count, before = LoopCount(), model.recurrent.watchers
    model.recurrent.watchers = (*before, count)
    try:
        yield count
    finally:
        model.recurrent.watchers = before


class _Seen(ExitRule):
    """A rule that never halts and keeps the scores of another one."""

    def __init__(self, rule: ExitRule):
        super().__init__(float("-inf"))
        self.rule = rule
        self.predicts, self.coda = rule.predicts, rule.coda
        self.scores: list[Tensor] = []

    def start(self, states: Tensor) -> Memory:
        return self.rule.start(states)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        score, memory = self.rule.score(look, memory)
        self.scores.append(score.flatten())
        return score, memory
