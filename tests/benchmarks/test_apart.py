"""Measurements in separate processes."""

import os

import pytest
import torch

from benchmarks.apart import apart
from benchmarks.session import Session


@pytest.fixture
def session():
    return Session(torch.device("cpu"), torch.zeros(1 << 20, dtype=torch.uint8), "zeros", quick=True)


def _where(session, number):
    return os.getpid(), session.quick, session.device, len(session.text), number + 1


def _fails(session):
    raise ArithmeticError(f"in process {os.getpid()}")


def test_each_call_runs_in_a_new_process_and_its_exceptions_are_raised_here(session):
    first, *rest = apart(_where, session, 41)
    assert rest == [True, torch.device("cpu"), 0, 42]
    with pytest.raises(ArithmeticError, match="in process") as caught:
        apart(_fails, session)
    assert len({str(os.getpid()), str(first), str(caught.value).rpartition(" ")[2]}) == 3
