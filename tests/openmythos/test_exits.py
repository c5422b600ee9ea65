"""Exit rules: each by its definition, position by position; the chosen limit keeps its promise."""

import pytest
import torch
import torch.nn.functional as F

from openmythos import KVCache
from openmythos.calibrate import calibrate
from openmythos.exits import (
    EXITS,
    ArgmaxExit,
    ConfidenceExit,
    EntropyExit,
    ExitState,
    HeadExit,
    KLExit,
    LatentExit,
    Look,
    after_loop,
    exit_rule,
)
from openmythos.ragged import RAGGED_KEY
from tests.kit.tiny import relative, tiny_config, tiny_model, tokens

LOOPS = 5


def lone(**fields):
    """A model in which a single token's loops can be followed by hand."""
    return tiny_model(**{"halting": "off", "max_loop_iters": LOOPS, **fields}).double().eval()


def trajectory(model, token):
    """States before and after each loop, and the predictions after it, of a prompt of one token."""
    seen = []
    step = model.recurrent.step

    def spy(h, e, u, f, state, t, last):
        out = step(h, e, u, f, state, t, last)
        seen.append((h[0, 0], out[0][0, 0]))
        return out

    model.recurrent.step = spy
    model(token)
    del model.recurrent.step
    after = [model(token, n_loops=t + 1)[0, 0].log_softmax(-1) for t in range(LOOPS)]
    return seen, after


def expected(rule, model, token):
    """The loops that the rule lets the token run."""
    states, predictions = trajectory(model, token)
    same = 0
    for t, ((before, after), p) in enumerate(zip(states, predictions)):
        if isinstance(rule, LatentExit):
            halts = (after - before).norm() / after.norm() < rule.limit
        elif isinstance(rule, HeadExit):
            halts = model.recurrent.act(after[None, None]) > 1 - rule.limit
        elif isinstance(rule, KLExit):
            halts = t > 0 and F.kl_div(predictions[t - 1], p, log_target=True, reduction="sum") < rule.limit
        elif isinstance(rule, ConfidenceExit):
            halts = p.exp().max() > 1 - rule.limit
        elif isinstance(rule, EntropyExit):
            halts = torch.distributions.Categorical(logits=p).entropy() < rule.limit
        else:
            same = same + 1 if t and p.argmax() == predictions[t - 1].argmax() else 1
            halts = same >= 2
        if halts:
            return t + 1
    return LOOPS


@torch.no_grad()
@pytest.mark.parametrize(
    "rule",
    [LatentExit(0.2), HeadExit(0.6), KLExit(0.05), ConfidenceExit(0.3), EntropyExit(2.0), ArgmaxExit(2)],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_by_definition(rule):
    depths = set()
    for seed in range(12):
        model, token = lone(), tokens(1, 1, seed=seed)
        with torch.no_grad():
            model.recurrent.injection.log_A.add_(seed % 3)
        wanted = expected(rule, model, token)
        cache = KVCache()
        model(token, exit=rule, kv_cache=cache)
        assert cache[RAGGED_KEY].last[0, 0] + 1 == wanted, seed
        # The output is the state at which the token halted.
        assert relative(model(token, exit=rule), model(token, n_loops=wanted)) < 1e-12
        depths.add(wanted)
    assert len(depths) > 1


@torch.no_grad()
def test_minimum_and_maximum():
    model, ids = lone(), tokens(2, 6)
    for rule, depth in ((LatentExit(1e9, minimum=3), 3), (LatentExit(0.0, maximum=2), 2), (LatentExit(0.0), LOOPS)):
        cache = KVCache()
        model(ids, exit=rule, kv_cache=cache)
        assert set(cache[RAGGED_KEY].last[:, :6].flatten().tolist()) == {depth - 1}


@torch.no_grad()
def test_a_score_equal_to_the_limit_does_not_halt():
    states = torch.tensor([[3.0, 4.0]])
    for changed, depth in ((states, 1), (2 * states, 0)):  # the state changes by 0 and by half of its norm
        look = Look(0, states, changed, None, None)
        assert LatentExit(0.5).halts(look, ())[0].item() == bool(depth)


@torch.no_grad()
def test_a_halted_position_stays_halted():
    state = ExitState(torch.tensor([True, False]), ())
    look = Look(1, torch.zeros(2, 4), torch.ones(2, 4), None, None)
    assert after_loop(LatentExit(0.0), state, look).running.tolist() == [True, False]


@torch.no_grad()
def test_act_as_an_exit_is_freeze():
    ids = tokens(2, 6)
    evolve, freeze = (tiny_model(halting=halting) for halting in ("evolve", "freeze"))
    assert torch.equal(evolve(ids, exit="act"), freeze(ids))
    assert relative(evolve(ids), freeze(ids)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "rule", ["latent", "head", ConfidenceExit(0.2, coda=False)], ids=["latent", "head", "confidence"]
)
def test_a_cache_changes_nothing(rule):
    model, ids = lone(), tokens(2, 8)
    cache = KVCache()
    parts = [model(ids[:, a:b], kv_cache=cache, start_pos=a, exit=rule) for a, b in ((0, 5), (5, 6), (6, 8))]
    assert relative(torch.cat(parts, 1), model(ids, exit=rule)) < 1e-12


def test_bad_arguments():
    model, ids = tiny_model(), tokens(1, 3)
    for exit in ("never", 3, LatentExit):
        with pytest.raises(ValueError, match=r"exit = .*must be None, one of act, head"):
            exit_rule(exit)
    with pytest.raises(ValueError, match=r"returned torch\.float32"):
        model(ids, exit=lambda t, before, after: after[..., 0])
    with pytest.raises(ValueError, match="return_ponder"):
        model(ids, exit="latent", return_ponder=True)
    with pytest.raises(ValueError, match="minimum = 0: must be an integer >= 1"):
        LatentExit(minimum=0)
    with pytest.raises(ValueError, match="must be continued in the same way"):
        cache = KVCache()
        model(ids, kv_cache=cache)
        model(ids, kv_cache=cache, start_pos=3, exit="latent")
    with pytest.raises(ValueError, match="reads predictions"):
        x = torch.zeros(1, 3, 24)
        model.recurrent(x, x, model.freqs_cis_mla[:3], n_loops=2, exit="kl")
    with pytest.raises(ValueError, match="loops = 'some'"):
        KVCache(loops="some")


@pytest.mark.parametrize("name", [name for name in EXITS if name != "act"])
def test_the_chosen_limit_keeps_its_promise(name):
    torch.manual_seed(0)
    model = lone()
    data = [(tokens(2, 9, seed=s)[:, :-1], tokens(2, 9, seed=s)[:, 1:]) for s in range(3)]
    found = calibrate(model, data, name, loss=0.05)
    assert found.loss <= found.full_loss + 0.05
    assert 1 <= found.mean_depth <= found.loops == LOOPS
    everything = calibrate(model, data, name, loss=1e9)
    assert everything.mean_depth <= found.mean_depth and everything.mean_depth < LOOPS
    assert model.recurrent.watchers == ()


def test_calibrate_refuses():
    model, data = lone(), [(tokens(1, 3), tokens(1, 3))]
    for wrong, match in (
        (dict(exit="act"), "ACT's threshold"),
        (dict(exit="kl", loss=-1), "loss = -1"),
        (dict(exit="kl", data=[]), "data: got no batch"),
    ):
        with pytest.raises(ValueError, match=match):
            calibrate(model, **{"data": data, **wrong})


def test_halt_bias():
    assert tiny_config().halt_bias == 0
    torch.manual_seed(0)
    from openmythos import OpenMythos

    model = OpenMythos(tiny_config(halt_bias=-3.0))
    assert model.recurrent.act.halt.bias.item() == -3
    with pytest.raises(ValueError, match="halt_bias"):
        tiny_config(halt_bias=float("inf"))
