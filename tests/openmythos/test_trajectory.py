"""The states of every loop: those that runs of so many loops end with, gradients included, on every path."""

import pytest
import torch

from openmythos import KVCache
from openmythos_kernels import accelerate
from openmythos_kernels.nn import paths
from tests.kit.tiny import tiny_model, tokens

LOOPS, BATCH, TOKENS = 4, 3, 6
KINDS = {
    "ACT": {},
    "freeze": {"halting": "freeze"},
    "off": {"halting": "off"},
    "parcae": {"halting": "off", "injection": "parcae", "lora_rank": 0},
    "concat": {"injection": "concat", "core_layers": 2},
    "gqa": {"attn_type": "gqa", "injection": "residual"},
}


def build(kind, fast):
    model = tiny_model(act_threshold=0.6, **KINDS[kind]).double()
    return accelerate(model) if fast else model


def without_halting(model, ids, n_loops):
    """Logits after n loops in which nothing halts, and the state before the coda, by a rule that never halts."""
    seen = []

    def never(t, before, after):
        seen.append(after)
        return torch.zeros(after.shape[:-1], dtype=torch.bool)

    return model(ids, n_loops=n_loops, exit=never), seen[-1]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loop_is_the_end_of_a_shorter_run(kind, fast):
    model, plain, ids = build(kind, fast), build(kind, False), tokens(BATCH, TOKENS)
    seen = model(ids, n_loops=LOOPS, return_trajectory=True)
    assert seen.halting.shape == (LOOPS * BATCH, TOKENS)
    logits, states = seen.by_loop(seen.output), seen.by_loop(seen.states)
    for t in range(LOOPS):
        expected, state = without_halting(plain, ids, t + 1)
        torch.testing.assert_close(logits[t], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(states[t], state, rtol=0, atol=1e-11)
        torch.testing.assert_close(seen.by_loop(seen.halting)[t], plain.recurrent.act(state), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"grad_loops": 2}, {"checkpoint_loops": True}, {"checkpoint_layers": True}])
@pytest.mark.parametrize("n_loops", [LOOPS, [2, 4, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_modules_give_the_same(kind, n_loops, options):
    ids, found = tokens(BATCH, TOKENS), []
    for fast in (False, True):
        model = build(kind, fast)
        seen = model(ids, n_loops=n_loops, return_trajectory=True, **options)
        assert all(torch.isfinite(x).all() for x in seen)
        weights = torch.linspace(0.5, 1.5, seen.output.numel()).double().view_as(seen.output)
        loss = (weights * seen.output.sin()).sum() + seen.halting.sin().sum() + seen.states.sin().mean()
        found.append((seen, gradients(model, loss)))
    (a, on_a), (b, on_b) = found
    for x, y in zip(a, b):
        torch.testing.assert_close(y, x, rtol=0, atol=1e-11)
    assert on_a.keys() == on_b.keys() and "recurrent.act.halt.weight" in on_a
    for name, wanted in on_a.items():
        torch.testing.assert_close(on_b[name], wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("fast", [False, True])
def test_sequences_with_loops_of_their_own(fast):
    """Rows are in the order of loops, each with its sequence; the numbers are those of the sequence alone."""
    model, ids, counts = build("ACT", fast), tokens(BATCH, TOKENS), [2, 4, 1]
    seen = model(ids, n_loops=counts, return_trajectory=True, return_hidden=True, start_pos=[0, 3, 5])
    assert seen.loop.tolist() == [0, 0, 0, 1, 1, 2, 3] and seen.sequence.tolist() == [0, 1, 2, 0, 1, 1, 1]
    for b, n in enumerate(counts):
        alone = model(ids[b : b + 1], n_loops=n, return_trajectory=True, return_hidden=True, start_pos=[0, 3, 5][b])
        for x, y in zip(seen, alone):
            if x.is_floating_point():
                torch.testing.assert_close(x[seen.sequence == b], y, rtol=0, atol=1e-11)
    whole = seen.by_loop(seen.halting)
    assert whole.shape == (4, 3, TOKENS) and not whole[1:, 2].any() and whole[:, 1].all()


def test_gradients_begin_where_they_are_asked_to():
    model, ids = build("off", False), tokens(2, 4)
    seen = model(ids, n_loops=3, grad_loops=1, return_trajectory=True)
    (on,) = torch.autograd.grad(seen.by_loop(seen.states)[:2].sum(), model.recurrent.injection.B, retain_graph=True)
    assert not on.any()
    (on,) = torch.autograd.grad(seen.by_loop(seen.states)[2].sum(), model.recurrent.injection.B)
    assert on.any()


def test_who_runs_it_is_reported():
    """The loop's own paths step aside or give the states; the fused step stays."""
    model = accelerate(tiny_model(halting="freeze"))

    ran = []
    before, paths.listener = paths.listener, lambda module, path: ran.append(path.__name__.rsplit(".")[-1])
    try:
        model(tokens(2, 5), n_loops=3, return_trajectory=True)
        model(tokens(2, 5), n_loops=[3, 1], return_trajectory=True)
    finally:
        paths.listener = before
    assert ran.count("looped") == 1 and ran.count("early_exit") == 1 and "fused_step" in ran


@pytest.mark.parametrize("fast", [False, True])
def test_what_does_not_go_together_is_refused(fast):
    model, ids = build("ACT", fast), tokens(1, 1)
    for options in ({"kv_cache": KVCache()}, {"exit": "latent"}, {"return_ponder": True}):
        with torch.no_grad(), pytest.raises(ValueError, match=r"return_trajectory = True: not with a kv_cache"):
            model(ids, return_trajectory=True, **options)
    with pytest.raises(ValueError, match=r"logits_at: must be None with return_trajectory"):
        model(ids, return_trajectory=True, logits_at=torch.tensor([0]))
