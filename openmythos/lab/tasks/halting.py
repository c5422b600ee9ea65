"""Models that need as many loops as their question has hops, and what makes them stop by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.calibrate import calibrate
from openmythos.config import MythosConfig
from openmythos.exits import Exit, ExitRule
from openmythos.lab.experiment import Settings
from openmythos.lab.statistics import spearman
from openmythos.lab.tasks.fitting import fit
from openmythos.lab.tasks.pointers import Questions, Vocabulary, chains, cycle
from openmythos.model import OpenMythos
from openmythos.training.halting_head import fit_halting
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.ranks import compute_device

TRAINING, TUNING, CHOOSING, TESTING = range(4)  # what sequences are drawn for: different ones for each


class Answered(NamedTuple):
    """What came of questions, one row each.

    Attributes:
        right: (Q,) bool. depth: (Q,) int64, loops that its position ran. hops: (Q,) int64. others: mean loops of the
            edges.
    """

    right: np.ndarray
    depth: np.ndarray
    hops: np.ndarray
    others: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def accuracies(self) -> dict[str, float]:
        """By number of hops."""
        return {str(k): float(self.right[self.hops == k].mean()) for k in np.unique(self.hops)}

    def spearman(self) -> float | None:
        """The rank correlation of depth and hops."""
        return spearman(self.depth.tolist(), self.hops.tolist())

    def harder(self, hops: int) -> Answered:
        """The questions of more hops than these."""
        keep = self.hops > hops
        return Answered(self.right[keep], self.depth[keep], self.hops[keep], self.others)


class Student:
    """A looped model of the task that `settings` describe.

    With "chains" in the settings questions are nodes of chains, and the answer is the end of theirs; else a
    sequence says how many hops along a cycle it asks for. After loop t a model shall be t hops further, or at the
    answer.

    Args:
        settings: nodes, hops (largest number), chains (lengths in training) or None, asked, model, loops (most in
            training), rows, seed, and those of the stages.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.words = Vocabulary(settings["nodes"], 0 if settings["chains"] else settings["hops"])
        torch.manual_seed(settings["seed"])
        self.model = OpenMythos(MythosConfig(vocab_size=self.words.size, **settings["model"]))
        self.words.prepare(self.model, torch.Generator().manual_seed(settings["seed"]))
        self.counts = 0 if settings["chains"] else 1  # tokens that say a number of hops
        self.device = compute_device()
        self.model.to(self.device)

    def questions(
        self, use: int, number: int, rows: int, hops: int, lengths: Sequence[int] = (), least: int = 1
    ) -> Questions:
        """Sequences: those of one use, number and size are always the same.

        Args:
            use: TRAINING and so on. least, hops: numbers of hops along a cycle. lengths: of chains.
        """
        rng = np.random.default_rng((self.settings["seed"], use, number))
        if self.settings["chains"]:
            made = chains(self.words, rows, tuple(lengths), self.settings["asked"], rng)
        else:
            made = cycle(self.words, rows, hops, rng, asks=True, least=least)
        return Questions(made.ids.to(self.device), made.asked, made.path.to(self.device), made.hops.to(self.device))

    def easy(self, use: int, number: int, rows: int) -> Questions:
        """Questions as in training."""
        return self.questions(use, number, rows, self.settings["hops"], self.settings["chains"] or ())

    def first_stage(self) -> Iterator[int]:
        """Trains without halting: a number of loops for each step, and after each loop the node where a question is."""
        s = self.settings
        optimizer = OptimizerConfig(
            lr=s["lr"], warmup=s["warmup"], schedule="wsd", decay=s["decay"], floor=0.0, weight_decay=0.01
        )
        return fit(self.model, self._answer_loss, s["steps"], optimizer)

    def _answer_loss(self, step: int) -> Tensor:
        asked, loops = self._chain_lesson(step) if self.settings["chains"] else self._cycle_lesson(step)
        logits = self.model(asked.ids, n_loops=loops)[:, -asked.asked :]
        return F.cross_entropy(logits.flatten(0, 1), reached(asked, loops).flatten())

    def _chain_lesson(self, step: int) -> tuple[Questions, int]:
        """Chains that grow, and loops that suffice for them."""
        s = self.settings
        grown = min(s["hops"], 1 + int(s["hops"] * step / (s["curriculum"] * s["steps"])))
        asked = self.questions(TRAINING, step, s["rows"], 0, [min(n, grown + 1) for n in s["chains"]])
        return asked, self._drawn(step, min(s["loops"], grown + grown // 2))

    def _cycle_lesson(self, step: int) -> tuple[Questions, int]:
        """First to hop, with no more loops than hops, of which the number grows; then to stop as well."""
        s = self.settings
        if step >= s["hopping"] * s["steps"]:
            return self.easy(TRAINING, step, s["rows"]), self._drawn(step, s["loops"])
        few = (s["hops"] + 2) // 2
        loops = self._drawn(step, min(few, 1 + int(2 * few * step / (s["hopping"] * s["steps"]))))
        return self.questions(TRAINING, step, s["rows"], s["hops"], least=loops), loops

    def _drawn(self, step: int, most: int) -> int:
        return int(np.random.default_rng((self.settings["seed"], TRAINING, step, 1)).integers(1, most + 1))

    def fit_halting(self) -> None:
        """Fits the halting layer alone to states of the trained model: whether a position's prediction is final."""
        s = self.settings
        asked = [self.easy(TUNING, number, s["rows"]).ids for number in range(s["fit_batches"])]
        fit_halting(self.model, [(ids, ids) for ids in asked], n_loops=s["loops"], iterations=s["fit_steps"])

    def tune(self) -> Iterator[int]:
        """Tunes the whole model: answers at a random number of loops, and halting once the prediction is final."""
        s = self.settings
        optimizer = OptimizerConfig(lr=s["tune_lr"], warmup=10, schedule="wsd", decay=0.5, floor=0.0, weight_decay=0.01)

        def loss(step: int) -> Tensor:
            asked = self.easy(TUNING, s["fit_batches"] + step, s["rows"])
            seen = self.model(asked.ids, n_loops=s["loops"], return_trajectory=True)
            logits = seen.by_loop(seen.output)
            labels, weights = self._labels(logits, asked.asked)
            halting = self.model.recurrent.act.halt(seen.by_loop(seen.states)).squeeze(-1)
            target = torch.stack([reached(asked, t + 1) for t in range(s["loops"])])
            answer = F.cross_entropy(logits[:, :, -asked.asked :].flatten(0, 2), target.flatten())
            # What halts freezes, and others go on reading it: answers are trained with the halting that is wanted, too.
            depths = 1 + (labels == 0).sum(0)
            frozen = self.model(asked.ids, n_loops=s["loops"], exit=at_depths(depths))[:, -asked.asked :]
            answer = answer + F.cross_entropy(frozen.flatten(0, 1), asked.answers.flatten())
            return answer + _halting_loss(halting, labels, weights)

        return fit(self.model, loss, s["tune_steps"], optimizer)

    @torch.no_grad()
    def _labels(self, logits: Tensor, asked: int) -> tuple[Tensor, Tensor]:
        """For each loop and position whether the prediction is that of the last loop from here on, and its weight. The
        token that says the hops stays until the questions are done, since they read its state; edges halt at once.
        Logits (loops, B, T, V) -> two of (loops, B, T)."""
        token = logits.argmax(-1)
        final = (token == token[-1]).flip(0).cumprod(0).flip(0).float()
        edges = final.shape[-1] - asked - self.counts
        final[:, :, :edges] = 1.0
        final[:, :, edges:-asked] = final[:, :, -asked:].amin(-1, keepdim=True)
        weight = torch.ones_like(final)
        weight[:, :, :edges] = OTHERS
        return final, weight

    @torch.no_grad()
    def answer(self, asked: Questions, loops: int, exit: Exit = None) -> Answered:
        """The questions' answers with an exit, or after all loops."""
        depth = torch.zeros(asked.ids.shape, dtype=torch.int64, device=self.device)

        def watch(running: Tensor, t: int) -> None:
            depth.add_(running)

        self.model.eval()
        self.model.recurrent.watchers = (watch,)
        try:
            logits = self.model(asked.ids, n_loops=loops, exit=exit)[:, -asked.asked :]
        finally:
            self.model.recurrent.watchers = ()
        depth = depth if exit is not None else torch.full_like(depth, loops)
        found = logits.argmax(-1) == asked.answers, depth[:, -asked.asked :], asked.hops
        right, deep, hops = (x.flatten().cpu().numpy() for x in found)
        edges = depth[:, : -asked.asked - self.counts]
        return Answered(right, deep, hops, edges.double().mean().item())

    def calibrated(self, exit: str, asked: Questions, loops: int, allowed: float) -> ExitRule:
        """The exit rule whose limit is chosen on these questions: `allowed` nats a question may be lost."""
        targets = torch.full_like(asked.ids, -100)
        targets[:, -asked.asked :] = asked.answers
        share = asked.asked / asked.ids.shape[1]  # calibrate divides by all positions
        return calibrate(self.model.eval(), [(asked.ids, targets)], exit, allowed * share, loops).rule


OTHERS = 0.1  # weight of the positions that ask nothing


def reached(asked: Questions, loops: int) -> Tensor:
    """(B, Q) int64, where the questions are after so many loops: at the answer, once they are there."""
    return asked.path.gather(-1, asked.hops.clamp(max=loops).unsqueeze(-1)).squeeze(-1)


def at_depths(depths: Tensor) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """An exit that halts each position after its number of loops, (B, T)."""
    return lambda t, before, after: depths <= t + 1


def _halting_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    asks = weights == 1
    return each[asks].mean() + OTHERS * each[~asks].mean()
