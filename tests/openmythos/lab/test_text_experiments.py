"""The experiments on text: their machinery at the smallest scale, and verdicts on made-up results."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from openmythos.lab import text
from openmythos.lab.experiment import SCALES, Result
from openmythos.lab.experiments import (
    cache_loops,
    depth_sampling,
    exits_on_text,
    expert_overlap,
    laws,
    parameters,
    stability,
)

MODULES = (depth_sampling, cache_loops, stability, parameters, laws, expert_overlap, exits_on_text)


def named(module):
    return module.__name__.rsplit(".", 1)[-1]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, request):
    """module -> its results at scale smoke, of one seed; computed once, models shared among the experiments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(text.KEPT, str(tmp_path_factory.mktemp("models")))
        found = {}

        def results(module):
            if module not in found:
                experiment = module.EXPERIMENT
                ticks = []
                found[module] = []
                for run in experiment.runs(experiment.scales["smoke"], [0]):
                    settings = json.loads(json.dumps(run.settings))
                    numbers = json.loads(json.dumps(run.compute(settings, lambda *x: ticks.append(x)), allow_nan=False))
                    found[module].append(Result(run.key, settings, numbers, 1.0))
                assert all(0 < done <= of for done, of in ticks)
            return found[module]

        yield results


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_smoke(module, smoke):
    experiment, results = module.EXPERIMENT, smoke(module)
    settings = experiment.scales["smoke"]
    verdict = experiment.judge(settings, results)
    assert verdict.outcome in ("holds", "rejected", "undecided") and verdict.because
    assert len(verdict.rows) >= len(results) and all(len(row) == len(verdict.columns) for row in verdict.rows)
    json.dumps([dict(verdict.figures), verdict.rows], allow_nan=False)
    axes = Figure().subplots()
    experiment.draw(settings, results, axes)
    assert axes.lines or axes.collections


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_is_data_at_every_scale(module):
    experiment = module.EXPERIMENT
    assert set(experiment.scales) == set(SCALES)
    for settings in experiment.scales.values():
        runs = experiment.runs(json.loads(json.dumps(settings)), [0, 1])
        assert len({run.key for run in runs}) == len(runs)
        for run in runs:
            text.config(run.settings["training"])  # checks every field
            assert run.settings["training"]["seed"] == run.settings["seed"]
    assert experiment.judge(experiment.scales["small"], []).outcome == "undecided"
    experiment.draw(experiment.scales["small"], [], Figure().subplots())


def test_fixed_depth_depends_on_it_more_than_random_depth(smoke):
    fixed, random = (one.found for one in smoke(depth_sampling))
    assert fixed["loss"][0] - fixed["loss"][2] > random["loss"][0] - random["loss"][2]


def test_a_latent_of_every_loop_gives_what_a_call_without_cache_gives(smoke):
    for one in smoke(cache_loops):
        assert [loss["each"] for loss in one.found["loss"]] == pytest.approx(one.found["whole"], abs=1e-5)
        assert all(abs(delta["first"]) > abs(delta["last"]) > 0 for delta in one.found["delta"])


def test_a_large_rate_raises_the_radius_of_concat_alone(smoke):
    rho = {(one.settings["injection"], one.settings["lr"]): one.found["rho_max"] for one in smoke(stability)}
    assert rho["concat", 4e-2] > 1 > rho["concat", 1e-2]
    assert all(value < 1 for (injection, _), value in rho.items() if injection in stability.STABLE)
    assert rho["add", 1e-2] == 1


def test_overlap_is_whole_with_itself_and_symmetric(smoke):
    for one in smoke(expert_overlap):
        overlap = np.array(one.found["overlap"])
        assert np.allclose(np.diagonal(overlap), 1) and np.allclose(overlap, overlap.T)
        assert 0 <= one.found["apart"] <= 1 and one.found["chance"] == 0.25


def test_larger_budgets_have_less_loss(smoke):
    loss = {one.key.split("-seed")[0]: one.found["own"] for one in smoke(laws)}
    assert all(loss[f"steps20-depth{n}"] < loss[f"steps10-depth{n}"] for n in (1, 2, 4))


def test_more_data_have_less_loss(smoke):
    loss = {one.key.split("-seed")[0]: one.found["loss"] for one in smoke(parameters)}
    assert all(loss[f"dense-{n}-data2"] < loss[f"dense-{n}-data1"] for n in (16, 24, 32))


def test_exits_run_fewer_loops(smoke):
    points = smoke(exits_on_text)[0].found["points"]
    loops = exits_on_text.SCALES["smoke"]["loops"]
    assert [point[4] for point in points if point[0] == "fixed"] == list(range(1, loops + 1))
    assert all(1 <= point[4] < loops for point in points if point[0] != "fixed")
    (pondernet,) = [one for one in smoke(exits_on_text) if one.settings["variant"] == "pondernet"]
    depths = [point[4] for point in pondernet.found["points"]]
    assert depths == sorted(depths) and 1 <= depths[0] < depths[-1] <= loops


def made(module, found, seeds=(0, 1, 2)):
    """The verdict on results of scale small that `found` makes up: (settings of the run, key) -> what it found."""
    experiment = module.EXPERIMENT
    settings = experiment.scales["small"]
    runs = experiment.runs(settings, seeds)
    results = [Result(run.key, run.settings, found(run.settings, run.key), 1.0) for run in runs]
    axes = Figure().subplots()
    experiment.draw(settings, [one for one in results if one.found is not None], axes)
    return experiment.judge(settings, [one for one in results if one.found is not None])


def curve(settings, values):
    loops = settings["loops"]
    return {
        "loops": loops,
        "loss": [float(np.interp(n, list(values), list(values.values()))) for n in loops],
        "fit": {"floor": 1.4, "gain": 1.0, "rate": 1.0, "rmse": 0.001},
    }


FIXED = {1: 1.776, 2: 1.470, 4: 1.411, 8: 1.425, 24: 1.439}  # the pilots'
RANDOM = {1: 1.477, 2: 1.433, 4: 1.433, 8: 1.436, 24: 1.437}


@pytest.mark.parametrize(
    ("fixed", "random", "outcome"),
    [
        ({}, {}, "holds"),
        ({24: 1.420}, {}, "rejected"),  # does not degrade beyond its depth
        ({1: 1.6}, {}, "rejected"),  # does not need its depth
        ({8: 1.40}, {}, "rejected"),  # is better at another depth
        ({}, {24: 1.45}, "rejected"),  # degrades
        ({}, {1: 1.52}, "rejected"),  # needs its depth
        ({}, {1: 1.40, 2: 1.40, 4: 1.40, 8: 1.40, 24: 1.40}, "rejected"),  # is better even at the fixed depth
    ],
)
def test_depth_sampling(fixed, random, outcome):
    values = {"fixed": {**FIXED, **fixed}, "poisson": {**RANDOM, **random}}
    assert made(depth_sampling, lambda s, key: curve(s, values[s["variant"]])).outcome == outcome


def test_depth_sampling_needs_both_models_of_a_seed_and_takes_the_median():
    def missing(s, key):
        return (
            curve(s, FIXED if s["variant"] == "fixed" else RANDOM) if (s["variant"] == "fixed") == s["seed"] else None
        )

    assert made(depth_sampling, missing, (0, 1)).outcome == "undecided"

    def outlier(s, key):
        return curve(s, RANDOM if s["variant"] == "poisson" or s["seed"] == 0 else FIXED)

    assert made(depth_sampling, outlier).outcome == "holds"


@pytest.mark.parametrize(
    ("fixed", "random", "first", "outcome"),
    [
        (0.025, 0.000, 0.05, "holds"),
        (0.004, 0.000, 0.05, "rejected"),
        (0.025, 0.011, 0.05, "rejected"),
        (0.010, 0.000, 0.05, "undecided"),
        (0.025, 0.005, 0.05, "undecided"),
        (0.025, 0.000, 0.002, "undecided"),
        (0.025, None, 0.05, "undecided"),
    ],
)
def test_cache_loops(fixed, random, first, outcome):
    def found(s, key):
        last = fixed if s["variant"] == "fixed" else random
        if last is None:
            return None
        delta = {"last": last, "first": first}
        loss = {"each": 1.4, "last": 1.4 + last, "first": 1.4 + first}
        return {"loops": [4, 8], "loss": [loss] * 2, "delta": [delta] * 2, "error": [delta] * 2}

    assert made(cache_loops, found).outcome == outcome


@pytest.mark.parametrize(
    ("largest", "rho", "related", "outcome"),
    [
        ({"mythos": 0.04, "parcae": 0.04, "concat": 0.02, "add": 0.04}, 0.7, True, "holds"),
        ({"mythos": 0.04, "parcae": 0.02, "concat": 0.04, "add": 0.01}, 0.7, True, "rejected"),
        ({"mythos": 0.04, "parcae": 0.04, "concat": 0.02, "add": 0.04}, 1.0, True, "rejected"),
        ({"mythos": 0.04, "parcae": 0.04, "concat": 0.02, "add": 0.04}, None, True, "rejected"),
        ({"mythos": 0.04, "parcae": 0.04, "concat": 0.02, "add": 0.04}, 0.7, False, "rejected"),
        ({"mythos": 0.02, "parcae": 0.04, "concat": 0.04, "add": 0.04}, 0.7, True, "undecided"),
    ],
)
def test_stability(largest, rho, related, outcome):
    def found(s, key):
        trains = s["lr"] <= largest[s["injection"]]
        mine = {"concat": 0.5 + 10 * s["lr"], "add": 1.0}.get(s["injection"], rho if s["lr"] > 0.03 else 0.5)
        norm = 100 * (np.exp(mine or 0) if related else np.exp(-(mine or 0)))
        loss = 2.0 if trains else (None if s["seed"] else 2.3)
        return {"loss": loss, "skipped": 0, "rho": mine, "rho_max": mine, "norms": [1.0, 2.0, float(norm)]}

    assert made(stability, found).outcome == outcome


def test_stability_counts_a_failed_step_and_waits_for_whole_seeds():
    def found(s, key, skipped=0):
        one = {"loss": 2.0, "skipped": skipped, "rho": 0.5, "rho_max": 0.5, "norms": [1.0, 2.0, 3.0]}
        return None if s["lr"] > 0.03 and s["injection"] == "add" and not skipped else one

    assert made(stability, found).outcome == "undecided"
    verdict = made(stability, lambda s, key: found(s, key, skipped=int(s["lr"] > 0.03)))
    assert verdict.figures["largest_rate_concat"] == 0.02


def test_stability_ranks_what_was_lost_above_all():
    pairs = [(0.5, 10.0), (0.9, 100.0), (1.5, 1000.0), (37.0, None), (None, None)]
    found = [{"rho": rho, "norms": [1.0, norm]} for rho, norm in pairs]
    results = [Result(str(i), {"injection": "concat"}, one, 1.0) for i, one in enumerate(found)]
    related = stability.correlations(results)
    assert related["concat"] == related["all"] == pytest.approx(0.975, abs=0.01) and related["add"] is None


@pytest.mark.parametrize(
    ("power", "noise", "outcome"), [(0.4, 0, "holds"), (0.0, 0, "rejected"), (0.2, 0.05, "rejected")]
)
def test_laws(power, noise, outcome):
    rng = np.random.default_rng(0)

    def found(s, key):
        spent = text.training_flops(s["training"])
        best = 2.5 * (spent / 1e11) ** power
        loss = 2 + 0.05 * np.log(s["training"]["depth"]["mean"] / best) ** 2 + noise * rng.standard_normal()
        return {"own": loss, "flops": spent, "loops": [1], "loss": [loss], "fit": {"rmse": 0.001}}

    verdict = made(laws, found)
    assert verdict.outcome == outcome
    assert noise or verdict.figures["exponent"] == pytest.approx(power, abs=0.02)
    assert verdict.figures["low"] <= verdict.figures["exponent"] <= verdict.figures["high"]


@pytest.mark.parametrize("case", ["end", "missing"])
def test_laws_undecided(case):
    def found(s, key):
        spent, depth = text.training_flops(s["training"]), s["training"]["depth"]["mean"]
        if case == "missing" and depth == 8:
            return None
        return {"own": 2 + 0.1 * depth, "flops": spent, "loops": [1], "loss": [2.0], "fit": {"rmse": 0.001}}

    assert made(laws, found).outcome == "undecided"


@pytest.mark.parametrize(
    ("ratio", "noise", "outcome"),
    [(1.5, 1e-4, "holds"), (1.0, 1e-3, "rejected"), (0.7, 1e-4, "rejected"), (1.1, 0.1, "rejected")],
)
def test_parameters(ratio, noise, outcome):
    """Losses of a dense model with `ratio` times the parameters, and the ratio that comes of them."""
    rng = np.random.default_rng(0)

    def found(s, key):
        count, spent = parameters.measure(text.config(s["training"])).parameters, text.training_flops(s["training"])
        tokens = s["training"]["steps"] * s["training"]["batch"] * s["training"]["tokens"]
        counted = count * (ratio if s["kind"] == "looped" else 1)
        loss = 2 - 0.2 * np.log(counted / 1e5) - 0.1 * np.log(tokens / 1e6) + noise * rng.standard_normal()
        return {"parameters": count, "flops": spent, "tokens": tokens, "loss": loss}

    verdict = made(parameters, found)
    assert verdict.outcome == outcome
    if noise < 1e-3:
        assert verdict.figures["ratio"] == pytest.approx(ratio, rel=0.02)
        # With the same FLOPs a dense model sees more tokens, so it needs fewer parameters.
        assert verdict.figures["ratio_equal_flops"] < verdict.figures["ratio"]
    assert made(parameters, lambda s, key: None if "136" in key else found(s, key)).outcome == "undecided"


@pytest.mark.parametrize(("apart", "outcome"), [(0.4, "holds"), (0.81, "rejected"), (None, "undecided")])
def test_expert_overlap(apart, outcome):
    def found(s, key):
        whole = s["variant"] == "embedding-lora"
        value = apart if whole and apart is not None else 0.5
        if apart is None and not whole:
            return None
        numbers = {
            "apart": value,
            "next": value,
            "others": 0.3,
            "chance": 0.25,
            "entropy": 0.9,
            "loss": 2.0 + 0.1 * whole,
        }
        return {**numbers, "overlap": np.full((8, 8), value).tolist()}

    verdict = made(expert_overlap, found)
    assert verdict.outcome == outcome
    assert ("unequal" in verdict.because) == (outcome != "undecided")


def test_other_tokens_by_counting():
    import torch

    from openmythos.routing import RoutingStats

    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(2, 50, 6, generator=generator).topk(2).indices  # (loops, tokens, K)
    load = torch.stack([torch.bincount(one.flatten(), minlength=6) for one in chosen])
    found = expert_overlap._others(RoutingStats(load, torch.zeros(2), torch.zeros(2, 2)), 2)
    for t in range(2):
        sets = [set(one.tolist()) for one in chosen[t]]
        shared = [len(a & b) / 2 for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j]
        assert found[t].item() == pytest.approx(np.mean(shared), rel=1e-5)


@pytest.mark.parametrize(
    ("added", "depth", "fixed", "outcome"),
    [
        (0.005, 3.0, 0.02, "holds"),  # fixed depth at 3 loops loses 0.02
        (0.005, 4.5, 0.02, "rejected"),  # too many loops
        (0.011, 3.0, 0.02, "rejected"),  # too much loss
        (0.005, 3.0, 0.005, "undecided"),  # as good as fixed depth
        (None, 3.0, 0.02, "undecided"),
    ],
)
def test_exits_on_text(added, depth, fixed, outcome):
    def found(s, key):
        if s["variant"] != "random":
            return {"points": [["act", None, None, 1.5, 2.0]]}
        if added is None:
            return None
        points = [["fixed", None, None, 1.4 + (fixed if n < 5 else 0), float(n)] for n in range(1, 9)]
        return {"points": [*points, ["latent", 0.01, 0.1, 1.4 + added, depth], ["kl", 0.01, 0.1, 1.5, 7.0]]}

    assert made(exits_on_text, found).outcome == outcome
