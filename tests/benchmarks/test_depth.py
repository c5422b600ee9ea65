"""The number of rounds of the depth suite: LEAST while there is time, one when there is none."""

import math

import pytest
import torch

from benchmarks.progress import Progress
from benchmarks.session import Session
from benchmarks.suites import depth
from benchmarks.timing import Lap


def rounds(monkeypatch, seconds: float, share: float) -> int:
    """The number of rounds of one contender whose calls take `seconds` each."""
    session = Session(torch.device("cpu"), torch.zeros(4096, dtype=torch.uint8), "zeros", progress=Progress())
    monkeypatch.setattr(Session, "clock", property(lambda self: lambda call: (call(), seconds)[1]))
    monkeypatch.setattr(depth, "BUDGET_S", 0.0)  # budgets use the real clock, not the one above
    workloads = depth.Workloads(session, {"reference": None}, {})
    monkeypatch.setattr(workloads, "_warm", lambda *_: (Lap(lambda: None), torch.ones(1)))
    return len(workloads.measure("train", 1, share)["reference"])


@pytest.mark.parametrize(
    "share, expected", [(math.inf, depth.LEAST), (10.0, depth.LEAST), (5.0, 1), (0.0, 1), (-3.0, 1)]
)
def test_rounds_depend_on_the_time_left(monkeypatch, share, expected):
    assert rounds(monkeypatch, 2.0, share) == expected


def test_time_left_of_a_run():
    assert Session(torch.device("cpu"), torch.zeros(1), "").left() == math.inf
    assert Session(torch.device("cpu"), torch.zeros(1), "", ends=0.0).left() < 0
