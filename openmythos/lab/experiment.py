"""What an experiment of the laboratory is: a claim, the rule that rejects it, and runs that decide between them.

The claim, the rule and every threshold are written down before a run starts; `judge` only reads results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Any]
"""JSON data: what a run depends on, with nothing of the machine in it."""

SCALES = ("smoke", "small", "medium", "large")
"""smoke: seconds, for tests of the machinery. small: minutes on 2 cores. medium and large: a GPU."""


@dataclass(frozen=True)
class Run:
    """One unit of work, which is done whole or not at all; its result is kept by `key` and a digest of `settings`.

    Attributes:
        key: name of the run within its experiment, for file names and messages, e.g. "concat-seed0".
        settings: what `compute` gets. Equal settings give equal results, bit by bit on one machine.
        compute: (settings, tick) -> JSON data. It calls `tick(done, of)` now and then, for a progress bar.
    """

    key: str
    settings: Settings
    compute: Callable[[Settings, Callable[[int, int], None]], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What a run returned, beside its key and settings."""

    key: str
    settings: Settings
    found: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What the results say of the claim.

    Attributes:
        outcome: holds; rejected: the rule applies; undecided: results are missing, or neither applies.
        because: one sentence with the figures that decided.
        figures: name -> number, for comparisons between runs of the laboratory.
        columns, rows: a table of all runs: every seed is shown.
    """

    outcome: Literal["holds", "rejected", "undecided"]
    because: str
    figures: Mapping[str, float | None] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True)
class Experiment:
    """A claim, and how it can lose.

    Attributes:
        name: as on the command line. number: E1 and so on.
        title: a few words. claim, rule: a sentence or two each; the rule says when the claim is rejected.
        limits: what the experiment does not show.
        scales: scale -> settings.
        seeds: how many a full run has. first_seed: the first of them; on those before it the recipe was chosen, so
            that they are no evidence.
        runs: (settings of the scale, seeds) -> runs, the most telling first: a run of few minutes ends early.
        judge: (settings of the scale, results so far) -> verdict.
        draw: (settings of the scale, results so far, matplotlib axes) draws the one plot of the page.
    """

    name: str
    number: str
    title: str
    claim: str
    rule: str
    limits: str
    scales: Mapping[str, Settings]
    seeds: int
    runs: Callable[[Settings, Sequence[int]], Sequence[Run]]
    judge: Callable[[Settings, Sequence[Result]], Verdict]
    draw: Callable[[Settings, Sequence[Result], Any], None]
    first_seed: int = 0
