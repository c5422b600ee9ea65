"""How many rounds the depth suite takes: the least while there is time, one where there is none."""

import math

import pytest
import torch

from benchmarks.progress import Progress
from benchmarks.session import Session
from benchmarks.suites import depth
from benchmarks.timing import Lap


def rounds(monkeypatch, seconds: float, share: float) -> int:
    """Rounds of one contender whose every call takes so many seconds."""
    session = Session(torch.device("cpu"), torch.zeros(4096, dtype=torch.uint8), "zeros", progress=Progress())
    monkeypatch.setattr(Session, "clock", property(lambda self: lambda call: (call(), seconds)[1]))
    monkeypatch.setattr(depth, "BUDGET_S", 0.0)  # the clock is not the one that budgets go by
    workloads = depth.Workloads(session, {"reference": None}, {})
    monkeypatch.setattr(workloads, "_warm", lambda *_: (Lap(lambda: None), torch.ones(1)))
    return len(workloads.measure("train", 1, share)["reference"])


@pytest.mark.parametrize(
    "share, expected", [(math.inf, depth.LEAST), (10.0, depth.LEAST), (5.0, 1), (0.0, 1), (-3.0, 1)]
)
def test_rounds_follow_the_time_that_is_left(monkeypatch, share, expected):
    assert rounds(monkeypatch, 2.0, share) == expected


def test_what_is_left_of_a_run():
    assert Session(torch.device("cpu"), torch.zeros(1), "").left() == math.inf
    assert Session(torch.device("cpu"), torch.zeros(1), "", ends=0.0).left() < 0
