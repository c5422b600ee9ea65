"""The debug switch: a state that is not finite is one clear error; nothing hangs, with the switch or without."""

import pytest
import torch

from openmythos import KVCache, debug
from openmythos_kernels import accelerate
from openmythos_kernels.serve import Engine, speculative_stream
from tests.kit.tiny import tiny_model, tokens

BAD = 5  # the token whose embedding is not finite


@pytest.fixture
def checking(monkeypatch):
    monkeypatch.setattr(debug, "on", True)


def broken(fast=True, **fields):
    model = tiny_model(**{"act_threshold": 0.8, **fields})
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())  # else all logits of BAD are NaN
    model = accelerate(model) if fast else model
    with torch.no_grad():
        model.embed.weight[BAD] = float("nan")
        model.head.weight[BAD] = 0.0  # so no greedy token is BAD
    return model


def with_bad(ids):
    ids = ids.clone()
    ids[ids == BAD] = 6
    ids[0, 2] = BAD
    return ids


@pytest.mark.parametrize("halting", ["freeze", "evolve", "off"])
@pytest.mark.parametrize("fast", [False, True])
def test_what_enters_the_loop(fast, halting, checking):
    model, ids = broken(fast, halting=halting), with_bad(tokens(2, 5))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(FloatingPointError, match=r"before the first loop: NaN or inf"),
        ):
            model(ids)


@pytest.mark.parametrize("halting", ["freeze", "evolve"])
@pytest.mark.parametrize("fast", [False, True])
def test_the_loop_is_named(fast, halting, checking):
    model = tiny_model(halting=halting, act_threshold=9.0)
    with torch.no_grad():
        model.recurrent.lora.scale.weight[2] = float("inf")
    model = accelerate(model) if fast else model
    with pytest.raises(FloatingPointError, match="after loop 2: NaN or infinity at 10 of 10 positions"):
        model(tokens(2, 5))


@pytest.mark.parametrize("halting", ["freeze", "evolve"])
def test_a_decoded_token(halting, checking):
    model = broken(halting=halting)
    with pytest.raises(FloatingPointError, match=r"(first loop|all loops): NaN or infinity at 1 of 1"), torch.no_grad():
        decode(model)


def decode(model):
    cache = KVCache()
    model(torch.tensor([[1, 2, 3]]), kv_cache=cache)
    return model(torch.tensor([[BAD]]), kv_cache=cache, start_pos=3)


@pytest.mark.parametrize("halting", ["freeze", "evolve", "off"])
def test_without_the_switch_calls_end(halting):
    model, ids = broken(halting=halting), with_bad(tokens(2, 5))
    assert model(ids)[0, 2].isnan().any()
    with torch.no_grad():
        assert model(ids)[0, 2].isnan().any() and decode(model).isnan().any()


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("exit", [None, "latent"])
@pytest.mark.parametrize("halting", ["freeze", "evolve"])
def test_a_request_fails_alone(halting, exit, switched, needs_extension, monkeypatch):
    monkeypatch.setattr(debug, "on", switched)
    engine = Engine(broken(halting=halting), slots=2)
    bad = engine.submit([1, 2, BAD], 3, temperature=0, exit=exit)
    good = engine.submit([1, 2, 3], 3, temperature=0, exit=exit)
    assert len(good.result()) == 3
    with pytest.raises(RuntimeError, match="in the loop: NaN or inf" if switched else "logits: found NaN"):
        bad.result()


def test_speculation(checking, needs_extension):
    with pytest.raises(FloatingPointError, match="in the loop: NaN or infinity at 1 of 3"):
        list(speculative_stream(broken(), [1, 2, BAD], 3, speculate=(1, 2)))


def test_a_compiled_model_is_not_checked(checking):
    model = broken()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(with_bad(tokens(2, 5)))[0, 2].isnan().any()
