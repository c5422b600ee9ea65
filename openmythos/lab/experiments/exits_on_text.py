"""E10: loss against mean loops on text, for exits without training, trained halting, and fixed depths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.calibrate import calibrate
from openmythos.dropout import without_dropout
from openmythos.exits import ExitRule, Look, Memory
from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.experiments import depth_sampling
from openmythos.lab.statistics import seeds_said
from openmythos.lab.text import batches, by_variant, changed, each_training, shared

ZERO_SHOT = ("latent", "kl", "confidence", "entropy")
HALVES = 2  # of the held-out text: limits are chosen on the first, everything is read on the second


def scale(name: str, rows: int, count: int, rises: Sequence[float], ponder: Sequence[float]) -> dict[str, Any]:
    """Settings: `loops` is the full depth, `rises` the nats that a calibration may lose, `ponder` ACT's weights;
    `quantiles` are the shares of its halting distribution after which PonderNet's model halts.

    The model without a learned exit is E4's random one, at twice its mean depth.
    """
    theirs = depth_sampling.SCALES[name]
    random, loops = theirs["trainings"]["poisson"], 2 * theirs["mean"]
    whole = changed(random, depth={"sampling": "fixed", "mean": loops}, model={"max_loop_iters": loops})
    act = {"halting": "evolve", "act_remainder": "last", "halt_bias": -3.0}  # from 0 ACT collapses to a loop or two
    trainings = {"random": random}
    for weight in ponder:
        loss = {"ponder_weight": weight, "ponder_warmup": whole["steps"] // 2}
        trainings[f"act-{weight:g}"] = changed(whole, model=act, loss=loss)
    prior = {"prior_weight": 0.01, "prior_mean": loops / 2}
    begin = float(np.log(1 / (prior["prior_mean"] - 1)))  # the prior's halting probability
    trainings["pondernet"] = changed(whole, model={"halting": "off", "halt_bias": begin}, loss=prior)
    return {
        "trainings": trainings,
        "quantiles": [0.25, 0.5, 0.75],
        "loops": loops,
        "rises": list(rises),
        "reading": {"rows": rows, "batches": count},
        # loss: nats above full depth, share: of the loops, as the rule says. gain: nats below fixed depth, to hold.
        "thresholds": {"loss": 0.01, "share": 0.5, "gain": 0.001},
    }


SCALES = {
    "smoke": scale("smoke", 8, 1, [0.01], [0.01]),
    "small": scale("small", 32, 4, [0.003, 0.01, 0.03], [0.01]),
    "medium": scale("medium", 32, 8, [0.001, 0.003, 0.01, 0.03, 0.1], [0.001, 0.003, 0.01, 0.03]),
    "large": scale("large", 32, 8, [0.001, 0.003, 0.01, 0.03, 0.1], [0.001, 0.003, 0.01, 0.03]),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["loops", "rises", "quantiles", "reading"])


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains a model and reads what its exits give.

    Returns:
        points: [exit, nats that the calibration allowed or null, limit or null, loss, mean loops] each.
    """
    training, loops = settings["training"], settings["loops"]
    model, record = shared(training, tick)
    chosen, read = (batches(training, settings["reading"], (half, HALVES)) for half in range(HALVES))
    points: list[list[Any]] = []
    if training["loss"].get("prior_weight"):
        for quantile in settings["quantiles"]:
            found = loss_and_depth(model, read, loops, Quantile(quantile))
            points.append(["pondernet", None, 1 - quantile, *found])
    elif training["model"]["halting"] == "off":
        for n in range(1, loops + 1):
            points.append(["fixed", None, None, *loss_and_depth(model, read, n, None)])
        for exit in ZERO_SHOT:
            for rise in settings["rises"]:
                rule = calibrate(model, chosen, exit, rise, loops).rule
                points.append([exit, rise, rule.limit, *loss_and_depth(model, read, loops, rule)])
    else:
        points.append(["act", None, None, *loss_and_depth(model, read, loops, None)])
    return {**record, "points": points}


class Quantile(ExitRule):
    """Halts once the halting distribution that PonderNet learned has spent this share."""

    def __init__(self, share: float):
        super().__init__(1 - share)

    def start(self, states: Tensor) -> Memory:
        return (states.new_ones(states.shape[:-1], dtype=torch.float32),)

    def score(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        left = memory[0] * (1 - look.act(look.after).float())
        return left, (left,)


@torch.no_grad()
def loss_and_depth(
    model: Any, data: Sequence[tuple[Tensor, Tensor]], loops: int, exit: ExitRule | None
) -> tuple[float, float]:
    """Mean loss in nats per token, and the loops that a position ran in the mean."""
    ran, before = [0], model.recurrent.watchers

    def watch(running: Tensor, t: int) -> None:
        ran[0] += int(running.sum())

    model.recurrent.watchers = (*before, watch)
    total, tokens = 0.0, 0
    try:
        with without_dropout(model):
            for ids, targets in data:
                logits = model(ids, n_loops=loops, exit=exit).flatten(0, 1).float()
                total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
                tokens += targets.numel()
    finally:
        model.recurrent.watchers = before
    halts = exit is not None or model.cfg.halting != "off"
    return total / tokens, ran[0] / tokens if halts else float(loops)


def frontier(points: Sequence[Sequence[Any]], loops: int) -> Callable[[float], float]:
    """Mean loops -> the loss with fixed depths, interpolated between whole numbers."""
    fixed = {round(depth): loss for exit, _, _, loss, depth in points if exit == "fixed"}
    return lambda depth: float(np.interp(depth, range(1, loops + 1), [fixed[n] for n in range(1, loops + 1)]))


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    found, limit, loops = by_variant(results), settings["thresholds"], settings["loops"]
    columns = ["model", "seed", "exit", "nats allowed", "limit", "loss", "mean loops"]
    rows = [
        [variant, seed, exit, rise, None if bound is None else round(bound, 5), round(loss, 4), round(depth, 2)]
        for variant, seeds in found.items()
        for seed, one in seeds.items()
        for exit, rise, bound, loss, depth in one["points"]
    ]
    random = found.get("random")
    if not random:
        return Verdict("undecided", "The model whose exits need no training is missing.", {}, columns, rows)
    gathered: dict[tuple[str, float], list[tuple[float, float, float]]] = {}  # loss added, loops, against fixed depth
    for one in random.values():
        at_fixed = frontier(one["points"], loops)
        for exit, rise, _, loss, depth in one["points"]:
            if exit != "fixed":
                now = loss - at_fixed(loops), depth, loss - at_fixed(depth)
                gathered.setdefault((exit, rise), []).append(now)
    medians = {key: np.median(np.array(values), axis=0) for key, values in gathered.items()}
    good = {key: m for key, m in medians.items() if m[0] <= limit["loss"] and m[1] <= limit["share"] * loops}
    figures: dict[str, float | None] = {}
    for (exit, rise), (added, depth, against) in medians.items():
        name = f"{exit}_{rise:g}"
        figures |= {f"{name}_loss_added": added, f"{name}_loops": depth, f"{name}_against_fixed": against}
    figures = {name: None if value is None else float(value) for name, value in figures.items()}
    trained_text = _trained(found)
    if not good:
        near = min(medians, key=lambda key: medians[key][1] + 1e3 * max(medians[key][0] - limit["loss"], 0))
        because = (
            f"No exit is within {limit['loss']} nats of {loops} loops at {limit['share'] * loops:g} loops in the mean; "
            f"nearest: {near[0]}, {medians[near][0]:+.4f} nats at {medians[near][1]:.2f} loops.{trained_text}"
        )
        return Verdict("rejected", because, figures, columns, rows)
    best = min(good, key=lambda key: good[key][1])
    added, depth, _ = good[best]
    gain = min(m[2] for m in good.values())  # the exit that gains most on fixed depth
    because = (
        f"{best[0]} runs {depth:.2f} of {loops} loops at {added:+.4f} nats; {len(good)} of {len(medians)} settings "
        "meet "
        f"the rule. Against the same mean number of fixed loops the best of them is at {gain:+.4f} nats. "
        f"Medians over {seeds_said(len(random))}.{trained_text}"
    )
    # As good as fixed depth is no exit: then the rule is met by a model that needs few loops anyway.
    holds = gain <= -limit["gain"] and set(found) == set(settings["trainings"])
    return Verdict("holds" if holds else "undecided", because, figures, columns, rows)


def _trained(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    texts = []
    for variant, seeds in found.items():
        if variant != "random":
            points = np.array([[point[3:] for point in one["points"]] for one in seeds.values()])
            loss, depth = np.median(points, axis=0)[points.shape[1] // 2]  # PonderNet's median
            texts.append(f" {variant}: loss {loss:.3f} at {depth:.2f} loops.")
    return "".join(texts)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    colors = dict(zip(("fixed", *ZERO_SHOT), ("black", "tab:blue", "tab:orange", "tab:green", "tab:purple")))
    shown = set()
    for variant, seeds in by_variant(results).items():
        for one in seeds.values():
            for exit in dict.fromkeys(point[0] for point in one["points"]):
                mine = sorted((depth, loss) for name, _, _, loss, depth in one["points"] if name == exit)
                name = variant if exit not in colors else exit
                label = name if name not in shown else None
                shown.add(name)
                axes.plot(*zip(*mine), "o-", ms=4, lw=1, color=colors.get(exit, "tab:red"), label=label)
    axes.axvline(settings["thresholds"]["share"] * settings["loops"], ls=":", color="grey")
    axes.set(xlabel="mean loops of a position", ylabel="loss, nats per token")
    if results:
        axes.legend(fontsize="small")


EXPERIMENT = Experiment(
    name="exits-on-text",
    number="E10",
    title="Exits on text",
    claim="On text, an exit without training (latent change, KL, confidence or entropy, its limit calibrated on "
    "other text) halts positions after half the loops in the mean without loss, and does better than as many "
    "fixed loops.",
    rule="Rejected if no such exit is within 0.01 nats of full depth (twice the mean of training) at half the "
    "loops or fewer, medians over seeds. It holds if one is, and is 0.001 nats below the same mean number of "
    "fixed loops. ACT with a ponder cost and PonderNet as a negative control stand beside it.",
    limits="Loops are counted, not time: KL, confidence and entropy run coda and head in every loop. A model trained "
    "at a random depth is near its best with few loops already, so fixed depths are the bar. The models of "
    "ACT and PonderNet are others, trained at full depth.",
    scales=SCALES,
    seeds=3,
    runs=runs,
    judge=judge,
    draw=draw,
)
