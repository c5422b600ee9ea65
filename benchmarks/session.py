"""What every suite is given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.progress import Progress
from benchmarks.timing import Clock


@dataclass
class Session:
    """Device, text and limits of this run.

    Attributes:
        text: the corpus, uint8 (bytes,).
        quick: a one-minute slice; timing requirements are then reported, not enforced.
    """

    device: torch.device
    text: Tensor
    corpus: str
    quick: bool = False
    progress: Progress = field(default_factory=Progress)

    @property
    def clock(self) -> Clock:
        return Clock(self.device)

    def batches(self, batch: int, tokens: int, seed: int = 0):
        """Endless (ids, targets), each (batch, tokens) int64 on the device; the same sequence for the same seed."""
        random = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.text) - tokens - 1, (batch,), generator=random)
            rows = torch.stack([self.text[s : s + tokens + 1] for s in starts.tolist()]).long().to(self.device)
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@dataclass
class Requirement:
    """One row of what must be shown.

    Attributes:
        timing: depends on the machine's speed, hence not enforced by a quick run.
        higher: whether `measured` must be at least (else at most) `required`.
    """

    name: str
    required: float
    measured: float
    unit: str
    timing: bool
    higher: bool = True
    detail: str = ""

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return self.measured >= self.required if self.higher else self.measured <= self.required

    def as_dict(self) -> dict:
        return {**self.__dict__, "passed": self.passed}
