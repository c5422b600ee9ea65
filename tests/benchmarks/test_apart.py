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
    raise ArithmeticError("what went wrong")


def test_each_call_runs_in_a_new_process(session):
    first, second = (apart(_where, session, 41) for _ in range(2))
    assert len({os.getpid(), first[0], second[0]}) == 3
    assert first[1:] == (True, torch.device("cpu"), 0, 42)


def test_exceptions_are_raised_in_the_caller(session):
    with pytest.raises(ArithmeticError, match="what went wrong"):
        apart(_fails, session)
