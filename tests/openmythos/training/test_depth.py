import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openmythos import MythosConfig, OpenMythos
from openmythos.training.depth import DepthConfig, draw_depths
from openmythos_kernels import accelerate
from tests.kit.training import MODEL

SAMPLINGS = ("fixed", "uniform", "poisson", "lognormal_poisson")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_have_the_mean_and_stay_in_range(sampling):
    depth = DepthConfig(sampling=sampling, mean=6, max=40)
    draws = np.array([draw_depths(depth, step, 64) for step in range(200)])
    assert abs(draws.mean() - 6) < 0.15
    assert draws.min() >= 1 and draws.max() <= 40


def test_a_log_normal_rate_has_the_heavier_tail():
    spread = {
        s: np.std([draw_depths(DepthConfig(sampling=s, mean=8), step, 64) for step in range(100)])
        for s in ("poisson", "lognormal_poisson")
    }
    assert spread["lognormal_poisson"] > 1.3 * spread["poisson"]


def test_draws_depend_on_seed_and_step_alone():
    depth = DepthConfig(sampling="poisson", mean=5)
    assert draw_depths(depth, 3, 8, seed=1) == draw_depths(depth, 3, 8, seed=1)
    assert draw_depths(depth, 3, 8, seed=1) != draw_depths(depth, 4, 8, seed=1)
    assert draw_depths(depth, 3, 8, seed=1) != draw_depths(depth, 3, 8, seed=2)


def test_a_batch_draws_once():
    depth = DepthConfig(sampling="uniform", mean=9, per="batch")
    draws = [draw_depths(depth, step, 5) for step in range(20)]
    assert all(len(set(row)) == 1 for row in draws)
    assert len({row[0] for row in draws}) > 5


def test_the_largest_number_cuts_off():
    depth = DepthConfig(sampling="poisson", mean=6, max=7)
    assert max(max(draw_depths(depth, step, 32)) for step in range(20)) == 7


def test_the_curriculum_grows_to_the_mean():
    depth = DepthConfig(mean=5, curriculum_steps=9)
    drawn = [draw_depths(depth, step, 1)[0] for step in range(12)]
    assert drawn == sorted(drawn) and drawn[0] == 1 and drawn[9:] == [5, 5, 5]


@pytest.mark.parametrize("asked, loops", [("all", None), ("half", 3), (2, 2)])
def test_loops_with_gradients(asked, loops):
    assert DepthConfig(mean=5, grad_loops=asked).gradient_loops == loops


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mean": 0.5}, "depth.mean = 0.5: must be in 1"),
        ({"mean": 65}, "depth.mean = 65: must be in 1 .. depth.max = 64"),
        ({"mean": 2.5}, "depth.mean = 2.5: must be an integer"),
        ({"sigma": -1}, "depth.sigma = -1: must be"),
        ({"grad_loops": 0}, "depth.grad_loops = 0: must be"),
        ({"max": 0}, "depth.max = 0: must be"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DepthConfig(**wrong)


@pytest.mark.parametrize("halting", ["off", "evolve", "freeze"])
@pytest.mark.parametrize("fast", [False, True])
def test_truncated_gradients_of_drawn_depths_equal_a_plain_loop(halting, fast):
    """Each sequence by itself, its first loops without gradients: the definition, written out."""
    cfg = MythosConfig(**MODEL, halting=halting, act_threshold=0.9)
    torch.manual_seed(0)
    model = OpenMythos(cfg).double()
    ids, targets = torch.randint(257, (2, 4, 12))
    depth = DepthConfig(sampling="poisson", mean=4, grad_loops="half")
    drawn = next(d for step in range(99) if len(set(d := draw_depths(depth, step, 4))) > 2 and max(d) > 4)

    def plain_loop(row, n):
        x, freqs, mask, _ = model._embed(row, 0, False)
        for block in model.prelude:
            x = block(x, freqs, mask)
        recurrent, kept = model.recurrent, {}
        e = recurrent.injection.prepare(x, recurrent.norm)
        h = recurrent.initial_state(x)
        state = recurrent.halting(h, None)[2]
        for t in range(n):
            with torch.set_grad_enabled(t >= n - depth.gradient_loops):
                u = recurrent.enter(h, e, t)
                if halting == "freeze" and t:
                    # The keys of halted positions are those of their last loop: their input stays what it was.
                    u = torch.where(state.running[..., None], u, kept["u"])
                kept["u"] = u
                f = recurrent.block(u, freqs, mask, None, "")
                after, new = recurrent.step(h, e, u, f, state, t, t == n - 1)[:2]
                h = after if halting != "freeze" else torch.where(state.running[..., None], after, h)
                state = new
        out = recurrent.injection.readout(h if state is None else state.h_out)
        for block in model.coda:
            out = block(out, freqs, mask)
        return model.head(model.norm(out))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits = torch.cat([plain_loop(ids[b : b + 1], n) for b, n in enumerate(drawn)])
    expected = gradients(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    if fast:
        accelerate(model)
    logits = model(ids, n_loops=drawn, grad_loops=depth.gradient_loops)
    found = gradients(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
