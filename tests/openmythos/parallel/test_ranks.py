"""2 and 4 gloo ranks, divided in every way, train as one process does."""

from __future__ import annotations

import pytest

from openmythos.parallel import Plan
from tests.kit.ranks import run_ranks
from tests.openmythos.parallel.work import make, optimizer_of, train

STEPS = range(20)


TWO = [Plan(), Plan(shard=2), Plan(expert=2), Plan(shard=2, expert=2)]
FOUR = [Plan(data=2, shard=2), Plan(expert=2), Plan(shard=4, expert=4), Plan(data=2, shard=2, expert=2)]
DEPTHS = [1, 4, 6, 2]  # of the four sequences
# Ways in which ranks run different numbers of loops: fields of the model, arguments of the call.
APART: dict[str, tuple[dict, dict]] = {
    "halting": (dict(act_threshold=0.6, halt_bias=0.0), {}),
    "two layers in the loop": (dict(act_threshold=0.6, halt_bias=0.0, core_layers=2), {}),
    "depths": (dict(halting="off"), dict(loops=DEPTHS)),
    "the last loop takes the rest": (dict(act_remainder="last"), dict(loops=DEPTHS)),
    "truncated gradients": ({}, dict(loops=DEPTHS, grad_loops=2)),
    "checkpointed": ({}, dict(loops=DEPTHS, checkpoint_loops=True)),
    "truncated and checkpointed": ({}, dict(loops=DEPTHS, grad_loops=2, checkpoint_loops=True, return_ponder=False)),
}


def _train(rank: int, plans, steps: int, fields: dict, options: dict):
    found = []
    for plan in plans:
        model = make(plan=plan, **fields)
        found.append(train(model, optimizer_of(model), range(steps), **options))
    return found


def assert_equal_to_one_process(ranks: int, plans, steps: int, fields: dict, options: dict) -> None:
    (expected,) = _train(0, [Plan()], steps, fields, options)
    for results in run_ranks(_train, plans, steps, fields, options, ranks=ranks, timeout=60.0):
        for plan, found in zip(plans, results):
            for (loss, norm), (expected_loss, expected_norm) in zip(found, expected):
                assert loss == pytest.approx(expected_loss, abs=1e-5), plan
                assert norm == pytest.approx(expected_norm, rel=1e-4), plan


@pytest.mark.parametrize("ranks, plans", [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_losses_of_twenty_steps(ranks, plans):
    assert_equal_to_one_process(ranks, plans, 20, {}, {})


@pytest.mark.parametrize("way", [*APART])
def test_ranks_that_run_different_numbers_of_loops(way):
    fields, options = APART[way]
    assert_equal_to_one_process(2, TWO[2:], 3, fields, {"rate": 0.0, **options})


@pytest.mark.slow
@pytest.mark.parametrize("way", [*APART])
def test_four_ranks_that_run_different_numbers_of_loops(way):
    fields, options = APART[way]
    assert_equal_to_one_process(4, FOUR, 3, fields, {"rate": 0.0, **options})
