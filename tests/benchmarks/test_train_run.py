"""The suite ends with plain rows; its figures are those of a machine."""

import json

import pytest
import torch

pytest.importorskip("jsonargparse")

from benchmarks.session import Session
from benchmarks.suites import train_run


def test_the_suite_ends_with_rows(monkeypatch):
    monkeypatch.setattr(train_run, "_steps", lambda *a: {"reference": [2.0, 2.0], "fast": [1.0, 1.0]})
    monkeypatch.setattr(train_run, "_losses", lambda *a: {"reference": [2.0, 2.5, 2.2], "fast": [2.0, 2.5, 2.3]})
    monkeypatch.setattr(train_run, "apart", lambda measure, session, fast, kept: (30, 60) if kept else (100, 90))
    found = train_run.run(Session(torch.device("cpu"), torch.zeros(10, dtype=torch.uint8), "none", quick=True))
    assert json.dumps(found)
    assert [row["passed"] for row in found["requirements"]] == [True, True, True, True]
    assert [row["measured"] for row in found["requirements"]] == pytest.approx([2.0, 0.1, 0.3, 0.3])
