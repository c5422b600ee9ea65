"""What every suite is given."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmarks.progress import Progress
from benchmarks.timing import Clock
from openmythos.training import Batches


@dataclass
class Session:
    """Device, text and limits of this run.

    Attributes:
        text: the corpus' training part, uint8 (bytes,).
        corpus: what it is, for people.
        quick: a one-minute slice; timing requirements are then reported, not enforced.
        ends: on time.monotonic()'s clock, when a suite that can do with fewer samples should be done.
    """

    device: torch.device
    text: Tensor
    corpus: str
    quick: bool = False
    progress: Progress = field(default_factory=Progress)
    ends: float = math.inf

    def left(self) -> float:
        """Seconds until then."""
        return self.ends - time.monotonic()

    @property
    def clock(self) -> Clock:
        return Clock(self.device)

    def batches(self, batch: int, tokens: int, seed: int = 0) -> Batches:
        """Batches of this text; equal arguments give equal batches."""
        return Batches(self.text, batch, tokens, seed, self.device)


@dataclass
class Requirement:
    """One row of what must be shown.

    Attributes:
        measured: None if it could not be measured; detail then says why.
        timing: depends on the machine's speed, hence not enforced by a quick run.
        higher: whether `measured` must be at least (else at most) `required`.
    """

    name: str
    required: float
    measured: float | None
    unit: str
    timing: bool
    higher: bool = True
    detail: str = ""

    @property
    def passed(self) -> bool:
        if self.measured is None:
            return False
        # Written so that a NaN fails.
        return self.measured >= self.required if self.higher else self.measured <= self.required

    def as_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}
