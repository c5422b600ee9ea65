"""E5: whether one latent of a token is enough for later tokens, where the model makes one in every loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.cache import LOOP_KEY, KVCache
from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.experiments import depth_sampling
from openmythos.lab.statistics import seeds_said
from openmythos.lab.text import batches, by_variant, each_training, shared

Kept = Literal["each", "last", "first"]
KINDS: tuple[Kept, ...] = ("each", "last", "first")


def scale(name: str, rows: int, count: int) -> dict[str, Any]:
    """The models are those of E4, by the same settings."""
    theirs = depth_sampling.SCALES[name]
    mean = theirs["mean"]
    return {
        "trainings": theirs["trainings"],
        "loops": [mean, 2 * mean],
        "reading": {"rows": rows, "batches": count},
        # Nats per token. claim: at most (random) and at least (fixed) for the verdict "holds"; reject: beyond these.
        "thresholds": {"random": 0.003, "fixed": 0.015, "reject_random": 0.01, "reject_fixed": 0.005},
    }


SCALES = {"smoke": scale("smoke", 8, 1), "small": scale("small", 128, 2)} | {
    "medium": scale("medium", 64, 4),
    "large": scale("large", 64, 4),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    """Begins with the model that E4 trains last: side by side, each finds what the other has trained and kept."""
    backward = dict(reversed(settings["trainings"].items()))
    return each_training(compute, {**settings, "trainings": backward}, seeds, ["loops", "reading"])


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Decodes held-out text token by token with each kind of cache.

    Returns:
        loops -> kept -> mean loss; and the standard error of each difference from "each" over windows.
    """
    model, record = shared(settings["training"], tick)
    found: dict[str, Any] = {**record, "loops": settings["loops"], "loss": [], "delta": [], "error": [], "whole": []}
    data = batches(settings["training"], settings["reading"])
    for loops in settings["loops"]:
        by_kept = {kept: torch.cat([decode(model, *batch, loops, kept) for batch in data]) for kept in KINDS}
        with torch.no_grad():
            whole = [F.cross_entropy(model(x, n_loops=loops).flatten(0, 1), y.flatten()).item() for x, y in data]
        found["whole"].append(float(np.mean(whole)))  # all tokens in one call: must be what "each" gives
        found["loss"].append({kept: loss.mean().item() for kept, loss in by_kept.items()})
        apart = {kept: by_kept[kept] - by_kept["each"] for kept in KINDS[1:]}
        found["delta"].append({kept: gap.mean().item() for kept, gap in apart.items()})
        found["error"].append({kept: (gap.std() / len(gap) ** 0.5).item() for kept, gap in apart.items()})
    return found


@torch.no_grad()
def decode(model: Any, ids: Tensor, targets: Tensor, loops: int, kept: Kept) -> Tensor:
    """The loss of each window (B,), float64, when tokens come one by one and loops find what `kept` says of earlier
    ones: the latent of the same loop, that of the last one, or that of the first."""
    cache = KVCache(ids.shape[1], loops="last" if kept == "last" else "each")
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for i in range(ids.shape[1]):
        logits = model(ids[:, i : i + 1], n_loops=loops, kv_cache=cache, start_pos=i)
        total += F.cross_entropy(logits[:, 0].double(), targets[:, i], reduction="none")
        if kept == "first":
            _first_alone(cache, loops)
    return total / ids.shape[1]


def _first_alone(cache: KVCache, loops: int) -> None:
    """Gives every later loop the newest token's latent of the first loop."""
    for key in [key for key in cache if key == LOOP_KEY.format(0) or key.startswith(LOOP_KEY.format(0) + ".")]:
        first = cache[key]
        for t in range(1, loops):
            later = cache[LOOP_KEY.format(t) + key.removeprefix(LOOP_KEY.format(0))]
            for name, held in first.tensors.items():
                newest = first.lengths[0] - 1
                later.tensors[name][:, newest] = held[:, newest]


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    found, limit, mean = by_variant(results), settings["thresholds"], settings["loops"][0]
    columns = [
        "training",
        "seed",
        "loops",
        *(f"loss, {kept}" for kept in KINDS),
        "last - each",
        "first - each",
        "error",
    ]
    rows = [
        [variant, seed, loops, *(round(x, 4) for x in loss.values()), *(round(x, 4) for x in delta.values())]
        + [round(max(error.values()), 4)]
        for variant, seeds in found.items()
        for seed, one in seeds.items()
        for loops, loss, delta, error in zip(one["loops"], one["loss"], one["delta"], one["error"])
    ]
    figures: dict[str, float | None] = {
        f"{variant}_{kept}": float(np.median([one["delta"][0][kept] for one in seeds.values()]))
        for variant, seeds in found.items()
        for kept in KINDS[1:]
    }
    if set(found) != {"fixed", "poisson"}:
        return Verdict("undecided", "Not both models have been read yet.", figures, columns, rows)
    fixed, random = figures["fixed_last"], figures["poisson_last"]
    assert fixed is not None and random is not None
    first = min(float(figures[f"{variant}_first"] or 0.0) for variant in found)
    because = (
        f"With {mean} loops, the last loop's latent alone costs {random:+.4f} nats after random depth "
        f"(claim: at most {limit['random']}, rejected above {limit['reject_random']}) and {fixed:+.4f} after fixed "
        "depth "
        f"(claim: at least {limit['fixed']}, rejected below {limit['reject_fixed']}); the first loop's alone at least "
        f"{first:+.4f}. Medians over {seeds_said(min(map(len, found.values())))}."
    )
    if fixed < limit["reject_fixed"] or random > limit["reject_random"]:
        return Verdict("rejected", because, figures, columns, rows)
    holds = random <= limit["random"] and fixed >= limit["fixed"] and first > limit["random"]
    return Verdict("holds" if holds else "undecided", because, figures, columns, rows)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    found = by_variant(results)
    labels = [(variant, kept) for variant in found for kept in KINDS[1:]]
    for place, (variant, kept) in enumerate(labels):
        deltas = [one["delta"][0][kept] for one in found[variant].values()]
        axes.plot([place] * len(deltas), deltas, "o", color="tab:blue" if kept == "last" else "tab:orange")
        axes.hlines(np.median(deltas), place - 0.3, place + 0.3, color="black")
    axes.axhline(0, lw=0.5, color="grey")
    axes.set_xticks(range(len(labels)), [f"{kept} loop's\n{variant} depth" for variant, kept in labels])
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylabel("loss added, nats per token")


EXPERIMENT = Experiment(
    name="cache-loops",
    number="E5",
    title="Cache over loops",
    claim="A token's latent of its last loop is all that later tokens need, if depth was random in training (at "
    "most 0.003 nats), not if it was fixed (at least 0.015). That of its first loop never is.",
    rule="At the mean depth of training, medians over seeds: rejected if the last latent alone costs less than "
    "0.005 nats after fixed depth, or more than 0.01 after random depth.",
    limits="The models of E4, tokens decoded one by one in windows as long as in training. A prompt that comes in "
    "one call sees all latents of itself.",
    scales=SCALES,
    seeds=5,
    runs=runs,
    judge=judge,
    draw=draw,
)
