"""2 and 4 gloo ranks, divided in every way, train as one process does."""

from __future__ import annotations

import functools

import pytest
import torch

from openmythos.parallel import Plan
from tests.kit.ranks import run_ranks
from tests.openmythos.parallel.work import make, optimizer_of, train

STEPS = range(20)


def _train(rank: int, plans, options):
    found = []
    for plan in plans:
        torch.manual_seed(rank)
        model = make(plan=plan, **options.get("fields", {}))
        found.append(train(model, optimizer_of(model), STEPS, **options.get("call", {})))
    return found


@functools.cache
def alone():
    model = make()
    return train(model, optimizer_of(model), STEPS)


TWO = [Plan(), Plan(shard=2), Plan(expert=2), Plan(shard=2, expert=2)]
FOUR = [Plan(data=2, shard=2), Plan(expert=2), Plan(shard=4, expert=4), Plan(data=2, shard=2, expert=2)]


@pytest.mark.parametrize("ranks, plans", [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_losses_of_twenty_steps_are_those_of_one_process(ranks, plans):
    for results in run_ranks(_train, plans, {}, ranks=ranks, timeout=300.0):
        for plan, found in zip(plans, results):
            for (loss, norm), (expected, expected_norm) in zip(found, alone()):
                assert loss == pytest.approx(expected, abs=1e-5), plan
                assert norm == pytest.approx(expected_norm, rel=1e-4), plan
