"""Rows of the table of thresholds set for one test."""

from openmythos_kernels.nn.thresholds import THRESHOLDS


def set_threshold(monkeypatch, name: str, value: float) -> None:
    monkeypatch.setitem(THRESHOLDS, name, THRESHOLDS[name]._replace(value=value))
