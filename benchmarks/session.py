"""What every suite gets, and the requirements that it returns."""

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
    """Device, text and limits of one run.

    Attributes:
        text: the training part of the corpus, uint8 (bytes,).
        corpus: the name of the corpus.
        quick: whether this is a run of about a minute, which reports timing requirements without enforcing them.
        ends: the time, on the clock of `time.monotonic`, by which suites that can take fewer samples should end.
    """

    device: torch.device
    text: Tensor
    corpus: str
    quick: bool = False
    progress: Progress = field(default_factory=Progress)
    ends: float = math.inf

    def left(self) -> float:
        """Seconds until `ends`."""
        return self.ends - time.monotonic()

    @property
    def clock(self) -> Clock:
        return Clock(self.device)

    def batches(self, batch: int, tokens: int, seed: int = 0) -> Batches:
        """Batches of the text; equal arguments give equal batches."""
        return Batches(self.text, batch, tokens, seed, self.device)


def speed_requirement(
    name: str, required: float, ratio: dict | None, unit: str, why: str = "", higher: bool = True, detail: str = ""
) -> Requirement:
    """A timing requirement on the median of a `ratio` from `timing.speedup` or `timing.spread`.

    Args:
        ratio: None if it was not measured; `why` then says why.
        detail: precedes the range of the ratio.
    """
    rounds = f"{ratio['low']:.3g} .. {ratio['high']:.3g} in {ratio['n']} rounds" if ratio else why
    return Requirement(name, required, ratio and ratio["median"], unit, True, higher, detail + rounds)


@dataclass
class Requirement:
    """One number that is required, and what was measured.

    Attributes:
        measured: None if it could not be measured; `detail` then says why.
        timing: whether it depends on the machine's speed; a quick run does not enforce such requirements.
        higher: whether `measured` must be at least `required`; otherwise at most.
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
        # These comparisons are false for NaN, so NaN fails.
        return self.measured >= self.required if self.higher else self.measured <= self.required

    def as_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}
