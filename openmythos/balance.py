"""Balanced experts within a sequence: the loss that DeepSeek adds beside its router biases (arXiv 2412.19437, 2.1.2).

with recording_scores(model, len(ids)) as scores:
    logits = model(ids)
loss = loss + 1e-4 * scores.balance()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from openmythos.layers import at_least_fp32, recomputing
from openmythos.moe import MoEFFN
from openmythos.recurrence import RecurrentBlock


class RouterScores:
    """Router logits and chosen experts of a forward, of every layer, loop and sequence.

    Args:
        batch: sequences of the forward.

    Attributes:
        only: the sequence that a recurrent block runs alone, or None.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self.only: int | None = None
        self._calls: dict[MoEFFN, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._sequences: Tensor | None = None
        self._graded: Sequence[bool] = ()

    def enter(self, sequences: Tensor | None, graded: Sequence[bool]) -> None:
        """Before a loop.

        Args:
            sequences: (b,) int64, those that run it, numbered in the whole batch; None: all.
            graded: whether its gradients count, of each of them or of all.
        """
        self._sequences, self._graded = sequences, graded

    def add(self, layer: MoEFFN, logits: Tensor, expert_idx: Tensor) -> None:
        """A layer's call: logits (b * T, E) before the bias, expert_idx (b * T, K). Nothing if the backward pass runs
        it again."""
        if recomputing():
            return
        sequences = self._sequences
        if self.only is not None:
            sequences = torch.tensor([self.only], device=logits.device)
        elif sequences is None:
            sequences = torch.arange(self.batch, device=logits.device)
        if not len(sequences):
            return  # what runs for other ranks alone
        if logits.requires_grad and not all(self._graded):
            cut = torch.tensor([not one for one in self._graded], device=logits.device)
            cut = cut.expand(len(sequences)).repeat_interleave(len(logits) // len(sequences))
            logits = torch.where(cut.unsqueeze(-1), logits.detach(), logits)
        self._calls.setdefault(layer, []).append((logits, expert_idx, sequences))

    def balance(self) -> Tensor:
        """The balance loss, a scalar in float32 (float64 for float64 logits): the mean over layers and sequences of

            sum over experts e of f_e * P_e,   f_e = E / (K n) * (tokens routed to e),   P_e = (mean score of e),

        where the n tokens are a sequence's in all of its loops, and scores are the softmax of the router's logits. It
        is 1 where experts are balanced. Gradients go through the scores.

        Raises:
            ValueError: nothing was routed.
        """
        if not self._calls:
            raise ValueError("balance: the model has routed nothing, must have run once")
        found = [self._layer(layer, calls) for layer, calls in self._calls.items()]
        return torch.stack(found).mean()

    def _layer(self, layer: MoEFFN, calls: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        experts = layer.n_experts
        scores = at_least_fp32(calls[0][0].new_zeros(self.batch, experts))
        load, tokens = torch.zeros_like(scores).flatten(), torch.zeros_like(scores[:, 0])
        for logits, expert_idx, sequences in calls:
            length = len(logits) // len(sequences)
            each = at_least_fp32(logits).softmax(-1).unflatten(0, (len(sequences), length)).sum(1)
            scores = scores.index_add(0, sequences, each)
            place = sequences.repeat_interleave(length).unsqueeze(-1) * experts + expert_idx
            load.index_add_(0, place.flatten(), load.new_ones(place.numel()))
            tokens.index_add_(0, sequences, tokens.new_full((len(sequences),), length))
        share = load.view_as(scores) * experts / layer.topk / tokens.unsqueeze(-1)
        return (share * scores).sum(-1).div(tokens).mean()


@contextmanager
def recording_scores(model: nn.Module, batch: int) -> Iterator[RouterScores]:
    """A context for one forward of `model` on `batch` sequences, without a cache: its router scores, with gradients.

    Every position runs all loops of its sequence meanwhile, halted or not, so that the scores do not depend on what is
    left out where nothing changes the output.
    """
    scores = RouterScores(batch)
    found = [module for module in model.modules() if isinstance(module, (MoEFFN, RecurrentBlock))]
    for module in found:
        module.scores = scores
    try:
        yield scores
    finally:
        for module in found:
            module.scores = None
