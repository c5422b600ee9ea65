"""Plans, initial weights, and what one process needs of the package."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from openmythos import DenseConfig, DenseTransformer, MythosConfig, OpenMythos
from openmythos.parallel import Plan, accumulating, clip_grad_norm_, initialize, parallelize, split_groups, unwrap
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tiny_config, tiny_model
from tests.openmythos.parallel.work import FIELDS, loss_of, make


@pytest.mark.parametrize(
    "plan, ranks, expected",
    [
        (dict(), 4, Plan(4, 1, 1)),
        (dict(shard=2), 8, Plan(4, 2, 1)),
        (dict(data=2, shard=2, expert=4), 4, Plan(2, 2, 4)),
        (dict(data=3), 4, "data * shard must be the number of ranks, 4"),
        (dict(expert=3), 4, "expert must divide the number of ranks, 4"),
        (dict(shard=0), 4, "Plan.shard = 0: must be an integer >= 1"),
    ],
)
def test_a_plan_fits_the_ranks_or_says_why_not(plan, ranks, expected):
    if isinstance(expected, Plan):
        assert Plan(**plan).over(ranks) == expected
    else:
        with pytest.raises(ValueError) as error:
            Plan(**plan).over(ranks)
        assert expected in str(error.value)


@pytest.mark.parametrize("injection", ["mythos", "residual", "parcae", "concat", "add"])
def test_initial_weights_are_distributed_as_the_constructors(injection):
    cfg = MythosConfig(
        **{**vars(tiny_config(injection=injection, halt_bias=-3.0)), "dim": 64, "vocab_size": 500, "expert_dim": 48}
    )
    torch.manual_seed(0)
    expected = {name: p.detach() for name, p in OpenMythos(cfg).named_parameters()}
    with torch.device("meta"):
        model = OpenMythos(cfg)
    found = {name: p.detach() for name, p in parallelize(model, seed=1).named_parameters()}
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        spread, near = float(p.std(correction=0)), 6 / p.numel() ** 0.5
        if spread < 1e-6:  # a constant
            torch.testing.assert_close(found[name], p)
        else:
            assert float(found[name].std(correction=0)) == pytest.approx(spread, rel=near), name
            assert abs(float(found[name].mean() - p.mean())) < 1.5 * near * spread, name
    torch.testing.assert_close(model.freqs_cis, OpenMythos(cfg).freqs_cis)
    assert model.head.weight is model.embed.weight
    assert not model.recurrent.block.ffn.router_bias.any()


def test_initial_weights_follow_from_the_seed_and_leave_the_generator_alone():
    models = [DenseTransformer(DenseConfig(**vars(tiny_config()), n_layers=2)) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2)):
        initialize(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    layers = models[0].layers
    assert not torch.equal(layers[0].ffn.gate.weight, layers[1].ffn.gate.weight)


def _weights(rank: int, plan: Plan):
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = OpenMythos(tiny_config(**FIELDS))
    found = {}
    for name, p in unwrap(parallelize(model, plan, seed=7)).named_parameters():
        found[name] = p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
    return found


def test_initial_weights_do_not_depend_on_the_ranks():
    expected = _weights(0, Plan())
    results = run_ranks(_weights, Plan(shard=2, expert=2))
    together = {**results[0], **results[1]}
    assert together.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in together.items())
    assert not all(name in results[0] for name in expected)  # each holds some experts alone


def _from_weights(rank: int):
    model = unwrap(parallelize(tiny_model(seed=rank, **FIELDS), Plan(expert=2)))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_weights_that_are_there_stay_and_are_rank_0s():
    expected = dict(tiny_model(seed=0, **FIELDS).named_parameters())
    for found in run_ranks(_from_weights):
        assert all(torch.equal(p, expected[name]) for name, p in found.items())


def _accumulated(rank: int):
    norms = []
    for plan in (Plan(), Plan(shard=2), Plan(expert=2), Plan(shard=2, expert=2), Plan(shard=2)):
        model = make(plan=plan)
        with accumulating(model):
            loss_of(model, 0).backward()
        loss_of(model, 1).backward()
        norms.append(float(clip_grad_norm_(model, 1.0)))
        assert float(clip_grad_norm_(model, 1.0)) == pytest.approx(1.0, rel=1e-4)
    return norms


def test_gradients_of_several_backward_passes_add_up():
    model = make()
    for step in (0, 1):
        loss_of(model, step).backward()
    expected = float(clip_grad_norm_(model, 1.0))
    assert expected > 1
    for norms in run_ranks(_accumulated):
        assert norms == pytest.approx([expected] * 5, rel=1e-4)


def _copies(rank: int):
    """Two copies of two groups of experts."""
    model = make(plan=Plan(expert=2))
    with accumulating(model):
        loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    return float(clip_grad_norm_(model, 1.0))


@pytest.mark.slow
def test_copies_of_experts_accumulate_too():
    model = make()
    for step in (0, 1):
        loss_of(model, step).backward()
    expected = float(clip_grad_norm_(model, 1.0))
    assert run_ranks(_copies, ranks=4) == pytest.approx([expected] * 4, rel=1e-4)


def _refused(rank: int):
    said = []
    dense = DenseTransformer(DenseConfig(**vars(tiny_config()), n_layers=2))
    cases = [
        (dense, Plan(expert=2), None),
        (tiny_model(n_experts=5), Plan(expert=2), None),
        (torch.nn.Linear(2, 2), Plan(), None),
        (tiny_model(), Plan(), torch.bfloat16),
    ]
    for model, plan, mixed in cases:
        with pytest.raises(ValueError) as error:
            parallelize(model, plan, mixed=mixed)
        said.append(str(error.value))
    groups = split_groups([{"params": list(make(plan=Plan(shard=2, expert=2)).parameters()), "lr": 0.1}])
    assert dist.get_world_size() == 2
    return said, [len({type(p) for p in group["params"]}) for group in groups]


def test_refusals_and_groups():
    for said, kinds in run_ranks(_refused):
        assert "the model has no experts" in said[0]
        assert "expert must divide the number of experts, 5" in said[1]
        assert "model: got Linear" in said[2]
        assert "mixed = torch.bfloat16: must be None without sharding" in said[3]
        assert kinds == [1, 1]
