import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from openmythos import MoEFFN
from openmythos.training import Batches, corpus, evaluate, learning_rate, make_optimizer, train
from tests.kit.bits import bits, same


@pytest.fixture(scope="module")
def text():
    return corpus()


@pytest.fixture
def data(text):
    return Batches(text.train, 2, 16, seed=5)


def figures(records):
    return [record[:4] for record in records]  # all but the speed


@pytest.mark.parametrize("fields", [dict(halting="off"), dict(n_layers=2)], ids=["looped", "dense"])
def test_a_tiny_model_learns_the_standard_library(build, text, fields):
    model = build(**fields)
    data, held_out = Batches(text.train, 4, 32, seed=1), Batches(text.validation, 4, 32)
    before = evaluate(model, held_out, 4)
    records = list(train(model, data, 60, lr=1e-2))
    assert [record.step for record in records] == list(range(1, 61))
    assert abs(records[0].loss - math.log(256)) < 0.2
    late = sum(record.loss for record in records[-10:]) / 10
    assert late < 3.5 < math.log(256) - 2
    assert evaluate(model, held_out, 4) < min(before - 1.8, 3.6)
    assert all(record.tokens_per_second > 0 for record in records)


def test_the_same_run_gives_the_same_bits_and_leaves_the_random_state(build, data):
    runs = []
    for noise in (1, 2):
        model = build(h0="noise", dropout=0.2)
        torch.manual_seed(noise)  # the global state is no part of a run
        state = torch.get_rng_state()
        records = figures(train(model, data, 3))
        assert torch.equal(state, torch.get_rng_state())
        runs.append((records, bits(model)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert figures(train(build(h0="noise", dropout=0.2), data, 3, seed=1)) != runs[0][0]


def test_dropout_differs_from_step_to_step(build, data):
    model = build(dropout=0.5)
    losses = [record.loss for record in train(model, [data[0]] * 2, 2, lr=0.0, router_rate=0.0)]
    assert losses[0] != losses[1]


def test_a_step_is_clipped_adamw(build, data):
    """One step, written out."""
    model, by_hand = build(), build()
    (record,) = train(model, data, 1, lr=0.01, warmup=0, clip=0.05, router_rate=0.0)
    inputs, targets = data[0]
    loss = F.cross_entropy(by_hand(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
    optimizer = make_optimizer(by_hand)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    assert record[:4] == (1, loss.item(), norm.item(), 0.01) and norm > 0.05
    assert same(bits(model), bits(by_hand))


def test_the_learning_rate_reaches_the_optimizer(build, data):
    model = build()
    optimizer = make_optimizer(model)
    for record in train(model, data, 3, optimizer=optimizer, lr=0.5, warmup=1, floor=0.2):
        want = learning_rate(record.step - 1, 3, 0.5, 1, 0.2)
        assert record.lr == want and {group["lr"] for group in optimizer.param_groups} == {want}


def test_schedule():
    rates = [learning_rate(step, 21, peak=2.0, warmup=4, floor=0.1) for step in range(30)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[12] == pytest.approx(1.1)  # halfway between 4 and 20: the middle of 2.0 and 0.2
    assert rates[20:] == pytest.approx([0.2] * 10)
    assert all(a > b for a, b in itertools.pairwise(rates[4:21]))
    assert learning_rate(0, 1, 1.0, warmup=0, floor=0.1) == 1.0


@pytest.mark.parametrize("injection", ["mythos", "residual", "parcae", "concat", "add"])
def test_only_matrices_decay(build, injection):
    model = build(injection=injection, attn_type="gqa" if injection == "add" else "mla")
    decayed, exempt = make_optimizer(model, weight_decay=0.3).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay, without = ({names[id(p)] for p in group["params"]} for group in (decayed, exempt))
    assert len(decayed["params"]) + len(exempt["params"]) == len(names) == len(with_decay | without)
    for name in without:
        end = name.split(".")[-1]
        assert (
            "norm" in name
            or end == "bias"
            or name in ("embed.weight", "recurrent.lora.scale.weight")
            or (name.startswith("recurrent.injection.") and end in ("log_A", "log_dt", "A_log", "dt_bias", "B", "C"))
        ), name
    assert not any("norm" in name or "bias" in name or "embed" in name for name in with_decay)
    assert [name for name in with_decay if "injection" in name] == (
        ["recurrent.injection.W.weight"] if injection == "concat" else []
    )
    assert {"recurrent.lora.B", "recurrent.block.ffn.router.weight"} <= with_decay


def test_router_biases_move_also_in_swapped_modules(build, data):
    class Swapped(MoEFFN):
        pass

    plain, swapped = build(), build()
    swapped.recurrent.block.ffn.__class__ = Swapped
    for model in (plain, swapped):
        list(train(model, data, 1, router_rate=0.25))
    bias = set(swapped.recurrent.block.ffn.router_bias.tolist())
    assert {-0.25, 0.25} <= bias <= {-0.25, 0.0, 0.25}
    assert same(bits(plain), bits(swapped))


def test_bf16_keeps_float32_weights(build, data):
    wide, low = build(), build()
    a, b = figures(train(wide, data, 3)), figures(train(low, data, 3, bf16=True))
    assert all(p.dtype == torch.float32 for p in low.parameters())
    assert a != b and [r[1] for r in a] == pytest.approx([r[1] for r in b], abs=0.03)
    assert evaluate(low, data, 2) != evaluate(low, data, 2, bf16=True)


def test_n_loops_reaches_the_model(build, data):
    seen = []
    model = build()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    list(train(model, data, 1, n_loops=3))
    evaluate(model, data, 1, n_loops=1)
    list(train(model, data, 1))
    assert seen == [{"n_loops": 3}, {"n_loops": 1}, {}]


def test_evaluate_is_the_mean_over_fixed_batches(build, data):
    model = build(dropout=0.3, h0="noise").train()
    model.coda.eval()
    torch.manual_seed(1)
    state, before = torch.get_rng_state(), bits(model)
    value = evaluate(model, data, 3)
    assert torch.equal(state, torch.get_rng_state()) and same(before, bits(model))
    assert value == evaluate(model, data, 3)
    assert model.training and model.recurrent.training and not model.coda.training
    assert model.recurrent.block.ffn.expert_load is None
    quiet = build().eval()
    losses = [F.cross_entropy(quiet(x).flatten(0, 1), y.flatten()).item() for x, y in (data[i] for i in range(3))]
    assert evaluate(quiet, data, 3) == pytest.approx(sum(losses) / 3, abs=1e-6)


def test_evaluating_between_steps_changes_nothing(build, data):
    one, two = build(dropout=0.1), build(dropout=0.1)
    a = figures(train(one, data, 2))
    b = []
    for record in train(two, data, 2):
        b.append(record[:4])
        evaluate(two, data, 1)
    assert a == b and same(bits(one), bits(two))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=-1), "steps = -1"),
        (dict(start=4), "start = 4: must be <= steps = 3"),
        (dict(warmup=1.5), "warmup = 1.5"),
        (dict(seed=True), "seed = True"),
        (dict(lr=-1.0), "lr = -1.0"),
        (dict(clip=float("nan")), "clip = nan"),
    ],
)
def test_bad_arguments(build, data, change, message):
    with pytest.raises(ValueError, match=message):
        train(build(), data, **{"steps": 3, **change})  # at the call, not at the first step
    with pytest.raises(ValueError, match="batches = 0"):
        evaluate(build(), data, 0)
