"""E8: how the best mean depth grows with compute, and how loss saturates with loops at test time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import bootstrap, seeds_said
from openmythos.lab.text import TRAININGS, changed, each_training, left_over, loss_by_loops, trained, training_flops
from openmythos.training.saturation import fit_saturation

PARCAE = 0.40  # the exponent that Parcae reports (arXiv 2604.12946)


def scale(name: str, training: Mapping[str, Any], depths: Sequence[int], steps: Sequence[int]) -> dict[str, Any]:
    """Settings: a budget is what `steps` steps cost at mean depth 4; every depth trains as long as its budget lasts."""
    base = changed(TRAININGS[name], **training)
    trainings = {}
    for length in steps:
        budget = training_flops(changed(base, steps=length, depth={"mean": 4}))
        for depth in depths:
            one = changed(base, steps=1, depth={"mean": depth}, model={"max_loop_iters": depth})
            trainings[f"steps{length}-depth{depth}"] = {**one, "steps": round(budget / training_flops(one))}
    return {
        "trainings": trainings,
        "loops": [1, 2, 4, 8] if name == "smoke" else [1, 2, 3, 4, 6, 8, 12, 16, 24],
        "reading": {"rows": base["batch"], "batches": 32 if name != "smoke" else 2},
    }


_TINY = {
    "model": {"dim": 64, "ffn_dim": 170, "max_seq_len": 64},
    "depth": {"max": 32},
    "batch": 8,
    "tokens": 64,
    "fast": False,  # the plain modules are quicker at this width
}

SCALES = {
    "smoke": scale("smoke", {"fast": False}, [1, 2, 3, 4], [10, 20]),
    "small": scale("small", _TINY, [1, 2, 4, 8], [200, 400, 800]),
    "medium": scale("medium", {"depth": {"max": 48}}, [1, 2, 4, 8, 12], [1000, 2000, 4000, 8000]),
    "large": scale("large", {"depth": {"max": 48}}, [1, 2, 4, 8, 12], [4000, 8000, 16000, 32000]),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["loops", "reading"], lambda name, training: {})


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains at one mean depth for one budget; `own` is the loss with as many loops as that depth."""
    training, loops = settings["training"], settings["loops"]
    model, record = trained(training, tick)
    losses = loss_by_loops(model, training, settings["reading"], [*loops, training["depth"]["mean"]])
    fit = fit_saturation(dict(zip(loops, losses)))
    return {**record, "loops": loops, "loss": losses[:-1], "own": losses[-1], "fit": fit._asdict()}


class Optimum(NamedTuple):
    """The best depths of the budgets, and the power law through them.

    Attributes:
        budgets: FLOPs, ascending. depths: the best mean depth of each, within the grid.
        at_end: of how many budgets it is the least or the largest depth of the grid.
        exponent: of depth ~ budget^exponent.
    """

    budgets: list[float]
    depths: list[float]
    at_end: int
    exponent: float


def optimum(budget: np.ndarray, depth: np.ndarray, loss: np.ndarray) -> Optimum:
    """The minima of parabolas in log depth, one a budget, and the slope of a line through them; all (n,)."""
    budgets, best, at_end = np.unique(budget), [], 0
    for one in budgets:
        mine = budget == one
        x = np.log(depth[mine])
        a, b, _ = np.polyfit(x, loss[mine], 2)
        # Without a minimum of its own the parabola is least at an end of the grid.
        low, high = x.min(), x.max()
        inner = -b / (2 * a) if a > 0 else (low if a * low**2 + b * low < a * high**2 + b * high else high)
        at_end += not low < inner < high
        best.append(float(np.clip(inner, low, high)))
    slope = float(np.polyfit(np.log(budgets), best, 1)[0])
    return Optimum(budgets.tolist(), np.exp(best).tolist(), at_end, slope)


def interval(budget: np.ndarray, depth: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """The exponent's bootstrap interval: what the parabolas leave over is drawn again."""
    budgets, x = np.unique(budget), np.log(depth)
    basis = np.concatenate([(budget == one)[:, None] * np.vander(x, 3) for one in budgets], axis=1)
    fitted, rest = left_over(loss, basis)
    return bootstrap(lambda drawn: optimum(budget, depth, fitted + drawn).exponent, rest.tolist())


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    columns = ["steps at depth 4", "FLOPs", "mean depth", "seed", "steps", "loss there", "saturation: floor", "gain"]
    columns += ["rate", "rmse"]
    rows = [
        [one.key.split("-")[0].removeprefix("steps"), f"{one.found['flops']:.2e}"]
        + [one.settings["training"]["depth"]["mean"], one.settings["seed"], one.settings["training"]["steps"]]
        + [round(one.found["own"], 4), *(round(x, 4) for x in one.found["fit"].values())]
        for one in results
    ]
    wanted = len(settings["trainings"])
    seeds = sorted({one.settings["seed"] for one in results})
    whole = [s for s in seeds if sum(one.settings["seed"] == s for one in results) == wanted]
    if not whole:
        return Verdict("undecided", "No seed has the whole grid yet.", {}, columns, rows)
    budget, depth, loss = grid([one for one in results if one.settings["seed"] in whole])
    if not np.isfinite(loss).all():
        return Verdict("undecided", "A loss of the grid is not finite.", {}, columns, rows)
    best, (low, high) = optimum(budget, depth, loss), interval(budget, depth, loss)
    random = [one for one in results if one.settings["training"]["depth"]["mean"] > 1]
    rmse = float(np.median([one.found["fit"]["rmse"] for one in random]))
    figures: dict[str, float | None] = {"exponent": best.exponent, "low": low, "high": high, "saturation_rmse": rmse}
    figures |= {f"best_depth_{i}": found for i, found in enumerate(best.depths)}
    together = ", ".join(f"{found:.1f} at {flops:.1e}" for flops, found in zip(best.budgets, best.depths))
    because = (
        f"Best mean depths: {together} FLOPs. Exponent {best.exponent:.2f}, 95 % interval {low:.2f} to {high:.2f} "
        f"(Parcae: {PARCAE:.2f}). Loss at test time is L_inf + Z exp(-z T) up to {rmse:.4f} nats. "
        f"{seeds_said(len(whole))}."
    )
    if best.at_end > 1:
        because += f" At {best.at_end} budgets the best depth is an end of the grid, which shows no law."
        return Verdict("undecided", because, figures, columns, rows)
    return Verdict("rejected" if low <= 0 else "holds", because, figures, columns, rows)


def grid(results: Sequence[Result]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Budget, mean depth and loss of each run, (n,) each; runs of one budget get the same number."""
    names = [one.key.split("-")[0] for one in results]
    spent: dict[str, list[float]] = {}
    for name, one in zip(names, results):
        spent.setdefault(name, []).append(one.found["flops"])
    budget = np.array([np.mean(spent[name]) for name in names])
    depth = np.array([float(one.settings["training"]["depth"]["mean"]) for one in results])
    return budget, depth, np.array([one.found["own"] for one in results], dtype=float)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    if not results:
        return
    budget, depth, loss = grid(results)
    for one in np.unique(budget):
        mine = budget == one
        (line,) = axes.plot(depth[mine], loss[mine], "o", label=f"{one:.1e} FLOPs")
        if len(np.unique(depth[mine])) > 2:
            x = np.linspace(np.log(depth[mine].min()), np.log(depth[mine].max()), 50)
            axes.plot(np.exp(x), np.polyval(np.polyfit(np.log(depth[mine]), loss[mine], 2), x), color=line.get_color())
    depths = sorted(set(depth.tolist()))
    axes.set(xscale="log", xlabel="mean loops in training and at test time", ylabel="loss, nats per token")
    axes.set_xticks(depths, [f"{n:g}" for n in depths])
    axes.minorticks_off()
    axes.legend()


EXPERIMENT = Experiment(
    name="laws",
    number="E8",
    title="Laws of depth",
    claim="The mean depth that is best for a training budget grows with the budget as a power law, and loss falls "
    "with loops at test time as L_inf + Z exp(-z T).",
    rule="Rejected if the exponent's 95 % bootstrap interval includes 0 or lies below. No verdict if the best "
    "depth is an end of the grid at more than one budget.",
    limits="One width and a factor of four in compute: an exponent from so short a range says little about larger "
    "ones. FLOPs are counted, not measured. The optimizer's settings are the same at every depth.",
    scales=SCALES,
    seeds=3,
    runs=runs,
    judge=judge,
    draw=draw,
)
