"""E1: a looped model trained on few hops answers many; a dense one does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import summary
from openmythos.lab.tasks.chaser import Chaser

MODEL = dict(
    dim=64,
    n_heads=4,
    n_kv_heads=4,
    attn_type="gqa",
    ffn_dim=128,
    max_seq_len=96,
    rope_theta=10000.0,
    prelude_layers=1,
    coda_layers=1,
    core_ffn="dense",
    lora_rank=0,
    halting="off",
    h0="e",
    max_loop_iters=5,
)
DENSE = {
    # As many parameters as the looped ones have, within 2 %.
    "dense-parameters": dict(n_layers=6, dim=48, ffn_dim=96),
    # As many FLOPs a token as they need for the deepest question of the training, 2 + 5 blocks.
    "dense-flops": dict(n_layers=7),
}
LOOPED = {name: dict(injection=name) for name in ("concat", "mythos", "residual", "parcae", "add")}
SMALL: dict[str, Any] = {
    "nodes": 17,  # prime, and 10, 20, 40 are -7, 3, 6 modulo it
    "trained": 5,
    "tested": [1, 2, 3, 4, 5, 10, 20, 40],
    "decides": 10,
    "looped": {"concat": LOOPED["concat"]},  # the one that learns in so few steps
    "dense": DENSE,
    "model": MODEL,
    "rows": 32,
    "steps": 1500,
    "patience": 2,  # a dense model may take this many times the steps
    "check": 250,  # steps between two looks at whether it has learned
    "lr": 2e-3,
    "warmup": 100,
    "curriculum": 0.45,  # the share of the steps over which the number of hops grows
    "questions": 2000,
}
SCALES = {
    "smoke": {
        **SMALL,
        "nodes": 5,
        "trained": 2,
        "tested": [1, 2, 3],
        "decides": 3,
        "dense": {"dense-flops": dict(n_layers=2)},
        "model": {**MODEL, "dim": 32, "ffn_dim": 64, "n_heads": 2, "n_kv_heads": 2},
        "steps": 250,
        "patience": 1,
        "warmup": 20,
        "lr": 5e-3,
        "curriculum": 0.0,
        "questions": 500,
    },
    "small": SMALL,
    "medium": {
        **SMALL,
        "nodes": 29,  # 10, 20, 40 are 10, -9, 11 modulo it
        "looped": LOOPED,
        "rows": 64,
        "steps": 4000,
        "patience": 10,
    },
    "large": {
        **SMALL,
        "nodes": 53,  # 10, 20, 40 are 10, 20, -13 modulo it
        "looped": LOOPED,
        "dense": {"dense-parameters": dict(n_layers=6, dim=192, ffn_dim=384), "dense-flops": dict(n_layers=7)},
        "model": {**MODEL, "dim": 256, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 512, "max_seq_len": 160},
        "rows": 128,
        "steps": 10000,
        "patience": 10,
        "lr": 1e-3,
    },
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    """Every model with the first seed, then with the next."""
    shared = {k: v for k, v in settings.items() if k not in ("looped", "dense", "decides")}
    models = {**settings["looped"], **settings["dense"]}
    return [
        Run(f"{name}-seed{seed}", {**shared, "name": name, "model": {**shared["model"], **change}, "seed": seed}, train)
        for seed in seeds
        for name, change in models.items()
    ]


def train(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains one model on 1 .. `trained` hops, a number for each step, and asks it for each of `tested`."""
    chaser, check = Chaser(settings), settings["check"]
    steps = settings["steps"] * (settings["patience"] if chaser.dense else 1)
    for step in chaser.train(steps):
        tick(step, steps)
        if chaser.dense and step % check == 0 and chaser.answers_all(LEARNED):
            break
    accuracy = {str(k): chaser.accuracy(k) for k in settings["tested"]}
    return {"accuracy": accuracy, "parameters": chaser.parameters, "steps": step}


# The thresholds of claim and rule.
LEARNED = 0.95  # a dense model counts if it is this good at every trained number of hops
HOLDS = 0.95
LEAST = 0.9
DENSE_MOST = 0.5


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    """See `EXPERIMENT.rule`."""
    decides = str(settings["decides"])
    at = {name: [r.found["accuracy"][decides] for r in _of(results, name)] for name in settings["looped"]}
    medians = {name: summary(values).median for name, values in at.items() if values}
    counted = {name: [r for r in _of(results, name) if _counts(settings, r)] for name in settings["dense"]}
    best = {name: max(r.found["accuracy"][decides] for r in some) for name, some in counted.items() if some}
    figures: dict[str, float | None] = {f"{name} at {decides} hops": medians.get(name) for name in settings["looped"]}
    for name in settings["dense"]:
        figures[f"{name} at {decides} hops"] = best.get(name)
    rows = [
        [r.settings["name"], r.settings["seed"], r.found["parameters"], r.found["steps"]]
        + [r.found["accuracy"][str(k)] for k in settings["tested"]]
        + ["" if r.settings["name"] in settings["looped"] else "yes" if _counts(settings, r) else "not learned"]
        for r in results
    ]
    columns = ["model", "seed", "parameters", "steps", *(f"k = {k}" for k in settings["tested"]), "counts"]
    said = ", ".join(f"{name} {value:.3f}" for name, value in medians.items())
    words = f"medians at {decides} hops: {said or 'none yet'}; " + (
        "; ".join(f"{name}: {_said(best.get(name), len(_of(results, name)))}" for name in settings["dense"])
    )
    whole = len(medians) == len(settings["looped"])
    if any(value >= DENSE_MOST for value in best.values()) or (whole and max(medians.values()) < LEAST):
        outcome = "rejected"
    elif medians and max(medians.values()) >= HOLDS and len(best) == len(settings["dense"]):
        outcome = "holds"
    else:
        outcome = "undecided"
    return Verdict(outcome, words, figures, columns, rows)  # type: ignore[arg-type]


def _of(results: Sequence[Result], name: str) -> list[Result]:
    return [r for r in results if r.settings["name"] == name]


def _counts(settings: Settings, result: Result) -> bool:
    return all(result.found["accuracy"][str(k)] >= LEARNED for k in settings["tested"] if k <= settings["trained"])


def _said(best: float | None, tried: int) -> str:
    return ("not learned, no comparison" if tried else "none yet") if best is None else f"{best:.3f} at most"


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    """Accuracy by number of hops, a line for each model and seed."""
    hops = settings["tested"]
    for colour, name in enumerate([*settings["looped"], *settings["dense"]]):
        for i, result in enumerate(_of(results, name)):
            style = "-" if name in settings["looped"] else "--"
            line = [result.found["accuracy"][str(k)] for k in hops]
            axes.plot(hops, line, style, marker="o", ms=3, color=f"C{colour}", label=name if i == 0 else None)
    axes.axvline(settings["trained"] + 0.5, color="grey", ls=":", lw=1)
    axes.text(settings["trained"] + 0.55, 0.02, "not trained", color="grey", fontsize=8)
    axes.axhline(1 / settings["nodes"], color="grey", lw=0.5)
    axes.set(xlabel="hops (loops of a looped model)", ylabel="share of right answers", xscale="log", ylim=(0, 1.03))
    axes.set_xticks(hops, [str(k) for k in hops])
    axes.minorticks_off()
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="hops",
    number="E1",
    title="More loops reason further",
    claim="On cyclic pointer chasing, trained on 1 to 5 hops with a loop for each hop, a looped variant answers 10 "
    "hops with an accuracy of at least 0.95; a dense model of equal parameters and one of equal FLOPs do not.",
    rule="A counted dense model (at least 0.95 on every trained number of hops within the allowed multiple of the "
    "looped models' steps; else: not learned, no comparison) reaches 0.5 at 10 hops, or no looped variant's median "
    "over the seeds reaches 0.9.",
    limits="One synthetic task, in which a loop has the right size for a hop and the number of loops is given. It says "
    "nothing of text, nor of models that must find out by themselves how many loops they need. Small models; the "
    "dense ones read the number of hops in unary, other forms may extrapolate better. At the small scale the only "
    "looped variant is concat, the one that learns in so few steps, and dense models get twice the steps; from medium "
    "on there are five variants, and dense models get ten times the steps.",
    scales=SCALES,
    seeds=5,
    runs=runs,
    judge=judge,
    draw=draw,
)
