"""2 and 4 gloo ranks, divided in every way, train as one process does."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from openmythos.parallel import Plan, parallelize
from tests.conformance.test_ranks import model_that_halts_by_token
from tests.kit.ranks import run_ranks
from tests.openmythos.parallel.work import make, optimizer_of, train

STEPS = range(20)


TWO = [Plan(), Plan(shard=2), Plan(expert=2), Plan(shard=2, expert=2)]
FOUR = [Plan(data=2, shard=2), Plan(expert=2), Plan(shard=4, expert=4), Plan(data=2, shard=2, expert=2)]
BATCHES = [torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 0, 1, 1]])]  # token 0 halts at once, token 1 never
DEPTHS = [1, 4, 6, 2]  # of the four sequences
# Ways in which ranks run different numbers of loops: fields of the model, arguments of the call.
APART: dict[str, tuple[dict, dict]] = {
    "two layers in the loop": (dict(core_layers=2), dict(loops=DEPTHS)),
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
    for results in run_ranks(_train, plans, steps, fields, options, ranks=ranks):
        for plan, found in zip(plans, results):
            for (loss, norm), (expected_loss, expected_norm) in zip(found, expected):
                assert loss == pytest.approx(expected_loss, abs=1e-5), plan
                assert norm == pytest.approx(expected_norm, rel=1e-4), plan


@pytest.mark.parametrize("ranks, plans", [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_losses_of_twenty_steps(ranks, plans):
    assert_equal_to_one_process(ranks, plans, 20, {}, {})


def _halts_by_token(rank: int, plans):
    return [halts_by_token(rank, plan, lambda model: model) for plan in plans]


def halts_by_token(rank: int, plan: Plan, swap) -> tuple[int, float]:
    """Loops that a rank runs whose positions halt at once on rank 0 and never on rank 1; the error of gradients."""
    model, alone = (model_that_halts_by_token(n_experts=6) for _ in range(2))
    loops = []
    model.recurrent.watchers = (lambda running, t: loops.append(t),)
    whole = swap(parallelize(model, plan))
    whole(BATCHES[rank]).logsumexp(-1).mean().backward()
    (sum(alone(ids).logsumexp(-1).mean() for ids in BATCHES) / 2).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    found = {name: p.grad for name, p in model.named_parameters()}
    whole_gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    return len(loops), max(float((g - expected[name]).norm() / norm) for name, g in whole_gradients.items())


def test_a_rank_whose_positions_have_halted_leaves_the_loop():
    for rank, results in enumerate(run_ranks(_halts_by_token, TWO)):
        for plan, (loops, error) in zip(TWO, results):
            assert loops == (1, 4)[rank], plan
            assert error < 1e-5, plan


@pytest.mark.parametrize("way", [*APART])
def test_ranks_that_run_different_numbers_of_loops(way):
    fields, options = APART[way]
    assert_equal_to_one_process(2, TWO[2:], 3, fields, {"rate": 0.0, **options})


@pytest.mark.slow
@pytest.mark.parametrize("way", [*APART])
def test_four_ranks_that_run_different_numbers_of_loops(way):
    fields, options = APART[way]
    assert_equal_to_one_process(4, FOUR, 3, fields, {"rate": 0.0, **options})
