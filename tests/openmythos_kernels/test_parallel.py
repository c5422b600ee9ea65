"""Swapped models on two gloo ranks: the fast paths run, whatever divides the model, and train as one process does."""

from __future__ import annotations

import pytest
import torch

from openmythos.parallel import Plan
from openmythos_kernels import accelerate, report
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tokens
from tests.openmythos.parallel.test_ranks import APART, halts_by_token
from tests.openmythos.parallel.work import make, my_part, optimizer_of, train

PLANS = {"ddp": Plan(), "fsdp": Plan(shard=2), "ep": Plan(expert=2), "fsdp, ep": Plan(shard=2, expert=2)}


def _swapped(rank: int, plan: Plan, fields: dict, options: dict, steps: int):
    model = accelerate(make(plan=plan, **fields))
    record = train(model, optimizer_of(model), range(steps), **options)
    rows = report(model, my_part(tokens(4, 9)))
    ran = {row.kind: {path.name for path in row.paths if path.runs} for row in rows}
    return record, ran, [(row.name, row.kind, row.backend, row.reason) for row in rows]


@pytest.fixture(scope="module")
def alone():
    model = make()
    return train(model, optimizer_of(model), range(4))


@pytest.mark.parametrize("way", [*PLANS])
def test_the_fast_paths_run_and_train_as_one_process(alone, way):
    for record, ran, rows in run_ranks(_swapped, PLANS[way], {}, {}, 4):
        for (loss, norm), (expected, expected_norm) in zip(record, alone):
            assert loss == pytest.approx(expected, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
        assert ran["MoEFFN"] == {"moe_exchanged" if PLANS[way].expert > 1 else "moe_repeated"}
        modules = {
            kind: names for kind, names in ran.items() if kind != "OpenMythos"
        }  # of a model only decoding is fast
        assert "reference" not in {name for names in modules.values() for name in names}
        for name, kind, backend, reason in rows:
            assert backend != "reference" or kind == "OpenMythos", (name, reason)


@pytest.mark.parametrize(
    "way", [way if way == "depths" else pytest.param(way, marks=pytest.mark.slow) for way in APART]
)
def test_ranks_that_run_different_numbers_of_loops(way):
    fields, options = APART[way]
    options = {"rate": 0.0, **options}
    model = make(**fields)
    expected = train(model, optimizer_of(model), range(3), **options)
    for record, _, _ in run_ranks(_swapped, PLANS["fsdp, ep"], fields, options, 3):
        for (loss, norm), (expected_loss, expected_norm) in zip(record, expected):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


def _halts_by_token(rank: int):
    return [halts_by_token(rank, plan, accelerate) for plan in PLANS.values()]


def test_a_rank_whose_positions_have_halted_leaves_the_loop():
    for rank, results in enumerate(run_ranks(_halts_by_token)):
        for plan, (loops, error) in zip(PLANS, results):
            assert loops == (1, 4)[rank], plan
            assert error < 1e-5, plan


def _mixed(rank: int):
    found = []
    for swap in (lambda model: model, accelerate):
        model = swap(make(plan=PLANS["fsdp, ep"], mixed=torch.bfloat16))
        record = train(model, optimizer_of(model), range(3))
        dtypes = {p.dtype for p in model.parameters()}
        ran = {row.kind: {path.name for path in row.paths if path.runs} for row in report(model, my_part(tokens(4, 9)))}
        found.append((record, ran.get("MoEFFN"), dtypes))
    return found


def test_mixed_precision_with_divided_experts(alone):
    for results in run_ranks(_mixed):
        for record, _, dtypes in results:
            assert [loss for loss, _ in record] == pytest.approx([loss for loss, _ in alone[:3]], abs=3e-2)
            assert dtypes == {torch.float32}
        assert results[1][1] == {"moe_exchanged"}
