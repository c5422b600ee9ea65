"""Models that chase pointers along a cycle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig
from openmythos.lab.experiment import Settings
from openmythos.lab.tasks.fitting import fit
from openmythos.lab.tasks.pointers import Vocabulary, cycle
from openmythos.model import LanguageModel
from openmythos.sizes import build
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.ranks import compute_device

HELD_OUT = 1_000_003  # seeds of held-out sequences begin here


class Chaser:
    """A model that chases pointers, looped or dense: a looped one runs a loop for a hop, a dense one reads the number
    of hops in unary.

    Args:
        settings: those of a run: nodes, trained, model, rows, lr, warmup, curriculum, questions, seed.

    Attributes:
        options: further arguments of the looped model's forward.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.options: dict[str, Any] = {}
        self.words = Vocabulary(settings["nodes"])
        self.dense = "n_layers" in settings["model"]
        kind = DenseConfig if self.dense else MythosConfig
        self.device = compute_device()
        torch.manual_seed(settings["seed"])
        self.model = cast(LanguageModel, build(kind(vocab_size=self.words.size, **settings["model"])))
        generator = torch.Generator().manual_seed(settings["seed"])
        self.words.prepare(self.model, generator)
        self.model.to(self.device)

    def logits(self, hops: int, loops: int, rows: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, nodes) and answers (B, Q) of the sequences of a seed."""
        asked = cycle(self.words, rows, hops, np.random.default_rng(seed), unary=self.dense)
        depth = {} if self.dense else {"n_loops": loops, **self.options}
        logits = self.model(asked.ids.to(self.device), **depth)
        return logits[:, -asked.asked :], asked.answers.to(self.device)

    def train(self, steps: int) -> Iterator[int]:
        """As `fit`, with a number of hops for each step that the curriculum lets grow."""
        s = self.settings

        def most(step: int) -> int:
            grown = 1 + int(s["trained"] * step / (s["curriculum"] * steps)) if s["curriculum"] else s["trained"]
            return min(s["trained"], grown)

        return self._fit(steps, s["lr"], s["warmup"], most, 0)

    def tune(self, steps: int, lr: float) -> Iterator[int]:
        """As `fit`, on every trained number of hops, from the weights that there are."""
        return self._fit(steps, lr, 10, lambda step: self.settings["trained"], 2)

    def _fit(self, steps: int, lr: float, warmup: int, most: Callable[[int], int], stream: int) -> Iterator[int]:
        """most: step -> largest number of hops. stream: stages with different ones see different sequences."""
        seed = self.settings["seed"]
        optimizer = OptimizerConfig(lr=lr, warmup=warmup, schedule="wsd", decay=0.5, floor=0.0, weight_decay=0.01)

        def loss(step: int) -> Tensor:
            hops = int(np.random.default_rng((seed, step, stream)).integers(1, most(step) + 1))
            logits, wanted = self.logits(hops, hops, self.settings["rows"], (seed, step, stream + 1))
            return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

        return fit(self.model, loss, steps, optimizer)

    @torch.no_grad()
    def held_out(self, hops: int, loops: int) -> tuple[Tensor, Tensor]:
        """As `logits`, for about `questions` questions that no training has, the same at every call."""
        self.model.eval()
        rows = -(-self.settings["questions"] // self.words.nodes)
        return self.logits(hops, loops, rows, (HELD_OUT + self.settings["seed"], hops))

    def accuracy(self, hops: int) -> float:
        """The share of right answers."""
        logits, wanted = self.held_out(hops, hops)
        return (logits.argmax(-1) == wanted).double().mean().item()

    def loss(self, hops: int, loops: int) -> float:
        """Mean cross-entropy in nats."""
        logits, wanted = self.held_out(hops, loops)
        return F.cross_entropy(logits.flatten(0, 1).double(), wanted.flatten()).item()

    def answers_all(self, least: float) -> bool:
        """Whether the accuracy is at least this for every trained number of hops."""
        return all(self.accuracy(k) >= least for k in range(self.settings["trained"], 0, -1))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())
