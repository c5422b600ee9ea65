"""E4: what the sampling of depth in training does to loss by number of loops at test time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import seeds_said
from openmythos.lab.text import TRAININGS, by_variant, changed, each_training, loss_by_loops, shared
from openmythos.training.saturation import Saturation, fit_saturation


def scale(name: str, mean: int, loops: Sequence[int], rows: int, batches: int) -> dict[str, Any]:
    """Settings: `far` is the depth far beyond the mean, `rivals` those among which the fixed model's own is best."""
    sampling = {"mean": mean, "per": "batch"}
    base = changed(TRAININGS[name], model={"max_loop_iters": mean})
    return {
        "trainings": {
            "fixed": changed(base, depth={"sampling": "fixed", **sampling}),
            "poisson": changed(base, depth={"sampling": "poisson", **sampling}),
        },
        "mean": mean,
        "far": 6 * mean,
        "rivals": [1, mean // 2, 2 * mean, 6 * mean],
        "loops": list(loops),
        "reading": {"rows": rows, "batches": batches},
        # Nats per token, from the pilots.
        "thresholds": {"fixed_far": 0.02, "fixed_one": 0.2, "random_far": 0.01, "random_one": 0.08},
    }


SCALES = {
    "smoke": scale("smoke", 4, [1, 2, 4, 8, 24], 16, 2),
    "small": scale("small", 4, [1, 2, 3, 4, 6, 8, 12, 16, 24], 64, 4),
    "medium": scale("medium", 8, [1, 2, 4, 6, 8, 12, 16, 24, 32, 48], 32, 16),
    "large": scale("large", 8, [1, 2, 4, 6, 8, 12, 16, 24, 32, 48], 32, 32),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["loops", "reading"])


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains a model and reads its loss with every number of loops."""
    model, record = shared(settings["training"], tick)
    loops = settings["loops"]
    losses = loss_by_loops(model, settings["training"], settings["reading"], loops)
    return {**record, "loops": loops, "loss": losses, "fit": fit_saturation(dict(zip(loops, losses)))._asdict()}


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    found, mean, far = by_variant(results), settings["mean"], settings["far"]
    columns = ["training", "seed", *(f"T = {n}" for n in settings["loops"]), "fit: floor", "gain", "rate", "rmse"]
    rows = [
        [variant, seed, *(round(x, 4) for x in one["loss"]), *(round(x, 4) for x in one["fit"].values())]
        for variant, seeds in found.items()
        for seed, one in seeds.items()
    ]
    both = sorted(set(found.get("fixed", {})) & set(found.get("poisson", {})))
    if not both:
        return Verdict("undecided", "No seed has both models yet.", columns=columns, rows=rows)

    def median(of: Callable[[Mapping[int, float], Mapping[int, float]], float]) -> float:
        """Over seeds, of a number made from the losses by loops of the fixed and the random model."""
        curves = [[dict(zip(found[v][s]["loops"], found[v][s]["loss"])) for v in ("fixed", "poisson")] for s in both]
        return float(np.median([of(fixed, random) for fixed, random in curves]))

    figures: dict[str, float | None] = {
        "fixed_far": median(lambda fixed, random: fixed[far] - fixed[mean]),
        "fixed_one": median(lambda fixed, random: fixed[1] - fixed[mean]),
        "random_far": median(lambda fixed, random: random[far] - random[mean]),
        "random_one": median(lambda fixed, random: random[1] - random[mean]),
        "fixed_minus_rivals": median(lambda fixed, random: fixed[mean] - min(fixed[n] for n in settings["rivals"])),
        "fixed_minus_random": median(lambda fixed, random: fixed[mean] - random[mean]),
        "random_rmse": float(np.median([found["poisson"][s]["fit"]["rmse"] for s in both])),
    }
    limit = settings["thresholds"]
    value: dict[str, float] = {name: number for name, number in figures.items() if number is not None}
    needs = {
        f"fixed: L({far}) - L({mean})": ("fixed_far", ">="),
        f"fixed: L(1) - L({mean})": ("fixed_one", ">="),
        f"random: L({far}) - L({mean})": ("random_far", "<="),
        f"random: L(1) - L({mean})": ("random_one", "<="),
    }
    conditions = {
        f"{words} = {value[name]:.3f}, required {sign} {limit[name]}": value[name] >= limit[name]
        if sign == ">="
        else value[name] <= limit[name]
        for words, (name, sign) in needs.items()
    }
    best = value["fixed_minus_rivals"] <= 0 and value["fixed_minus_random"] <= 0
    conditions[
        f"fixed is best at its own {mean}: {value['fixed_minus_rivals']:+.3f} against its other depths, "
        f"{value['fixed_minus_random']:+.3f} against random"
    ] = best
    missed = [text for text, met in conditions.items() if not met]
    because = "Not met: " + "; ".join(missed) if missed else "; ".join(conditions)
    because += f". Medians over {seeds_said(len(both))}."
    return Verdict("rejected" if missed else "holds", because, figures, columns, rows)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    colors = {"fixed": "tab:red", "poisson": "tab:blue"}
    for variant, seeds in by_variant(results).items():
        for i, one in enumerate(seeds.values()):
            label = f"trained with {variant} {settings['mean']}" if i == 0 else None
            axes.plot(one["loops"], one["loss"], "o", ms=4, color=colors[variant], label=label)
            dense = np.geomspace(1, max(one["loops"]), 100)
            axes.plot(dense, Saturation(**one["fit"])(dense), "-", lw=1, alpha=0.6, color=colors[variant])
    axes.set(xscale="log", xlabel="loops at test time", ylabel="loss, nats per token")
    axes.set_xticks(settings["loops"], [str(n) for n in settings["loops"]])
    axes.minorticks_off()
    if results:
        axes.legend()


EXPERIMENT = Experiment(
    name="depth-sampling",
    number="E4",
    title="Depth sampling",
    claim="A model trained with a fixed number of loops T is best with T loops and loses with fewer and with more. "
    "One trained with a random number has the same loss from a few loops on, up to many times its mean.",
    rule="Rejected if one of these fails in the median over seeds. Fixed T = 4: L(24) - L(4) >= 0.02 nats, L(1) - "
    "L(4) >= 0.2, the least loss at T itself, below the random model's there. Poisson of mean 4: L(24) - L(4) "
    "<= 0.01 and L(1) - L(4) <= 0.08.",
    limits="Bytes of Python source, models of 0.4 million parameters, 900 steps: nothing about large models or long "
    "training. Depths are drawn per batch. The saturation is fitted to few numbers of loops.",
    scales=SCALES,
    seeds=5,
    runs=runs,
    judge=judge,
    draw=draw,
)
