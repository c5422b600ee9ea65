"""E6: which injections keep the state bounded, and at which learning rates they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import seeds_said, spearman
from openmythos.lab.text import TRAININGS, batches, changed, each_training, loss_of, trained
from openmythos.training.trainer import Step

STABLE = ("mythos", "parcae")  # rho(A) < 1 by construction
INJECTIONS = (*STABLE, "concat", "add")
EVERY = 10  # steps between two looks at rho


def scale(name: str, training: Mapping[str, Any], rates: Sequence[float], loops: Sequence[int]) -> dict[str, Any]:
    """Settings: `loops` are the depths at which the state's norm is read."""
    base = changed(TRAININGS[name], **training)
    return {
        "trainings": {
            f"{injection}-lr{rate:g}": changed(base, model={"injection": injection}, optimizer={"lr": rate})
            for rate in rates
            for injection in INJECTIONS
        },
        "loops": list(loops),
        "reading": {"rows": base["batch"], "batches": 16 if name != "smoke" else 2},
        # margin: nats above the least loss of the seed up to which a rate counts as trained. twice: as the rule says.
        "thresholds": {"margin": 0.2, "twice": 2.0, "spearman": 0.3, "rho": 1.0},
    }


_TINY = {
    "model": {"dim": 64, "ffn_dim": 170, "max_seq_len": 64, "max_loop_iters": 8},
    "depth": {"mean": 8, "max": 24},
    "optimizer": {"warmup": 20},
    "steps": 400,
    "batch": 16,
    "tokens": 64,
    "fast": False,  # the plain modules are quicker at this width
}
_WIDE = {"model": {"max_loop_iters": 8}, "depth": {"mean": 8, "max": 24}, "steps": 2000}
_LOOPS = (1, 8, 24)

SCALES = {
    "smoke": scale("smoke", {"steps": 30, "fast": False}, [1e-2, 4e-2], [1, 4, 8]),
    "small": scale("small", _TINY, [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2], _LOOPS),
    "medium": scale("medium", _WIDE, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], _LOOPS),
    "large": scale("large", _WIDE, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], _LOOPS),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["loops", "reading"], _about)


def _about(name: str, training: Settings) -> Settings:
    return {"injection": training["model"]["injection"], "lr": training["optimizer"]["lr"]}


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains at one rate and watches the linear part of the update; numbers that are not finite become null."""
    rhos: list[float] = []

    def watch(model: nn.Module, step: Step) -> None:
        if step.step % EVERY == 0:
            rhos.append(_rho(model))

    model, record = trained(settings["training"], tick, watch)
    loss = loss_of(model, settings["training"], settings["reading"])
    norms = state_norms(model, batches(settings["training"], settings["reading"])[0][0], max(settings["loops"]))
    return {
        **record,
        "loss": _finite(loss),
        "rho": _finite(_rho(model)),
        "rho_max": _finite(max(rhos, default=0.0)),
        "norms": [_finite(norms[n - 1]) for n in settings["loops"]],
    }


def _rho(model: Any) -> float:
    weights = (p for p in model.recurrent.injection.parameters())
    finite = all(bool(p.isfinite().all()) for p in weights)
    return model.recurrent.injection.spectral_radius() if finite else float("inf")


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


@torch.no_grad()
def state_norms(model: Any, ids: Tensor, loops: int) -> list[float]:
    """The mean norm of a position's state after each loop, on ids (B, T)."""
    norms: list[float] = []

    def look(t: int, before: Tensor, after: Tensor) -> Tensor:
        norms.append(after.float().norm(dim=-1).mean().item())
        return torch.zeros(after.shape[:-1], dtype=torch.bool, device=after.device)  # nothing halts

    model(ids, n_loops=loops, exit=look)
    return norms


def largest_rates(settings: Settings, results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """injection -> seed -> the largest rate that trains, 0 if none does."""
    best: dict[int, float] = {}
    for one in results:
        loss, seed = one.found["loss"], one.settings["seed"]
        if loss is not None:
            best[seed] = min(loss, best.get(seed, loss))
    found: dict[str, dict[int, float]] = {}
    for one in results:
        seed, seeds = one.settings["seed"], found.setdefault(one.settings["injection"], {})
        loss = one.found["loss"]
        trains = loss is not None and not one.found["skipped"]
        trains = trains and loss <= best[seed] + settings["thresholds"]["margin"]
        seeds[seed] = max(seeds.get(seed, 0.0), one.settings["lr"] if trains else 0.0)
    return found


def correlations(results: Sequence[Result]) -> dict[str, float | None]:
    """Spearman's correlation of rho with log norm after the most loops: over all runs, and within each injection.

    What was not finite ranks above all that was.
    """
    found = {}
    for group in ("all", *INJECTIONS):
        pairs = [
            [float("inf") if x is None else x for x in (one.found["rho"], one.found["norms"][-1])]
            for one in results
            if group in ("all", one.settings["injection"])
        ]
        found[group] = spearman(*zip(*pairs)) if len(pairs) > 2 else None
    return found


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    limit = settings["thresholds"]
    columns = ["injection", "rate", "seed", "loss", "skipped", "rho", "largest rho"]
    columns += [f"norm, T = {n}" for n in settings["loops"]]
    rows = [
        [one.settings["injection"], one.settings["lr"], one.settings["seed"], _short(one.found["loss"])]
        + [one.found["skipped"], _short(one.found["rho"]), _short(one.found["rho_max"])]
        + [_short(norm) for norm in one.found["norms"]]
        for one in sorted(results, key=lambda one: (one.settings["injection"], one.settings["lr"]))
    ]
    wanted = len(settings["trainings"])
    whole = [s for s in {one.settings["seed"] for one in results} if _count(results, s) == wanted]
    counted = [one for one in results if one.settings["seed"] in whole]
    # A rho that is missing was not finite: those weights were lost, which is no bound either.
    broken = [one for one in results if one.settings["injection"] in STABLE and not _bounded(one.found, limit["rho"])]
    if broken and not whole:
        text = f"rho(A) reached {limit['rho']} in {len(broken)} runs of {' and '.join(STABLE)}."
        return Verdict("rejected", text, {}, columns, rows)
    if not whole:
        return Verdict("undecided", "No seed has every injection and rate yet.", {}, columns, rows)
    rates = {k: float(np.median(list(v.values()))) for k, v in largest_rates(settings, counted).items()}
    related = correlations(counted)
    figures: dict[str, float | None] = {f"largest_rate_{name}": rate for name, rate in rates.items()}
    figures |= {f"spearman_{name}": rho for name, rho in related.items()}
    strongest = max((rho for rho in related.values() if rho is not None), default=0.0)
    together = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    because = (
        f"Largest rates that train: {together}. rho(A) reached {limit['rho']} in {len(broken)} runs of "
        f"{' and '.join(STABLE)}. Spearman of rho with log norm: at most {strongest:.2f}. {seeds_said(len(whole))}."
    )
    if broken or rates["concat"] >= limit["twice"] * max(rates["parcae"], 1e-12) or strongest < limit["spearman"]:
        return Verdict("rejected", because, figures, columns, rows)
    holds = min(rates[name] for name in STABLE) >= max(rates["concat"], rates["add"])
    return Verdict("holds" if holds else "undecided", because, figures, columns, rows)


def _count(results: Sequence[Result], seed: int) -> int:
    return sum(one.settings["seed"] == seed for one in results)


def _bounded(found: Mapping[str, Any], limit: float) -> bool:
    return all(found[name] is not None and found[name] < limit for name in ("rho", "rho_max"))


def _short(x: float | None) -> float | str:
    return "not finite" if x is None else round(x, 4)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    colors = dict(zip(INJECTIONS, ("tab:blue", "tab:green", "tab:orange", "tab:red")))
    for injection, color in colors.items():
        mine = [one for one in results if one.settings["injection"] == injection and one.found["loss"] is not None]
        rates = sorted({one.settings["lr"] for one in mine})
        losses = [np.median([one.found["loss"] for one in mine if one.settings["lr"] == rate]) for rate in rates]
        axes.plot([one.settings["lr"] for one in mine], [one.found["loss"] for one in mine], "o", ms=3, color=color)
        axes.plot(rates, losses, "-", color=color, label=injection)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per token")
    axes.legend()


EXPERIMENT = Experiment(
    name="stability",
    number="E6",
    title="Stability of the state",
    claim="With mythos' and Parcae's injections rho(A), the spectral radius of the update's linear part, is below 1 "
    "whatever happens, and they train at every learning rate at which concat and add do. rho goes with the "
    "state's norm.",
    rule="A rate trains if no step failed and the held-out loss is within 0.2 nats of the best of the seed. "
    "Rejected if rho(A) >= 1 in a run of mythos or Parcae, if concat trains at twice Parcae's largest rate "
    "(median over seeds), or if Spearman's correlation of rho with log norm is below 0.3 over all runs and "
    "within every injection.",
    limits="Small models, 400 steps, gradients clipped at norm 1, rates a factor of two apart: a largest rate is "
    "known to that factor. Mythos' injection adds the block's whole output to its state; nothing bounds that "
    "part of the update.",
    scales=SCALES,
    seeds=3,
    first_seed=1,  # the recipe was chosen on seed 0
    runs=runs,
    judge=judge,
    draw=draw,
)
