"""E9: whether a router chooses other experts in other loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import seeds_said
from openmythos.lab.text import TRAININGS, batches, by_variant, changed, each_training, loss_of, trained
from openmythos.routing import RoutingStats, recording_routing, routing_stats

LAYER = "recurrent.block.ffn"
APART = 4  # loops between the two whose experts are compared
# The loop embedding belongs to mythos' injection; parcae's has none. LoRA's table has one row per loop.
VARIANTS: dict[str, dict[str, Any]] = {
    "embedding-lora": {},
    "embedding": {"lora_rank": 0},
    "lora": {"injection": "parcae"},
    "neither": {"injection": "parcae", "lora_rank": 0},
}


def scale(name: str, training: Mapping[str, Any], rows: int, count: int) -> dict[str, Any]:
    base = changed(TRAININGS[name], **training)
    loops = base["model"]["max_loop_iters"]
    return {
        "trainings": {
            variant: changed(base, depth={"sampling": "fixed", "mean": loops}, model=changes)
            for variant, changes in VARIANTS.items()
        },
        "reading": {"rows": rows, "batches": count},
        # overlap: as the rule says. equal: nats within which two losses count as equal.
        "thresholds": {"overlap": 0.8, "equal": 0.02},
    }


_MOE = {
    "core_ffn": "moe",
    "injection": "mythos",
    "max_loop_iters": 8,
    "n_experts": 8,
    "n_experts_per_tok": 2,
    "n_shared_experts": 1,
}
_BALANCE = {"router_rate": 1e-2}  # a short training balances its experts only if their biases move quickly
_TINY_MOE = {**_MOE, "dim": 64, "ffn_dim": 170, "max_seq_len": 64, "expert_dim": 64, "lora_rank": 8}
_WIDE_MOE = {**_MOE, "n_experts": 32, "n_experts_per_tok": 4, "expert_dim": 352, "lora_rank": 16}

SCALES = {
    "smoke": scale("smoke", {"model": {**_MOE, "expert_dim": 16, "lora_rank": 4}, "loss": _BALANCE, "steps": 20}, 8, 2),
    "small": scale("small", {"model": _TINY_MOE, "loss": _BALANCE, "steps": 400, "batch": 8, "tokens": 64}, 64, 4),
    "medium": scale("medium", {"model": _WIDE_MOE, "steps": 3000}, 32, 8),
    "large": scale("large", {"model": _WIDE_MOE}, 32, 8),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["reading"])


@torch.no_grad()
def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains a mixture and compares the experts of its loops on held-out text."""
    with torch.enable_grad():
        model, record = trained(settings["training"], tick)
    each = []
    for ids, _ in batches(settings["training"], settings["reading"]):
        with recording_routing(model):
            model(ids)
        each.append(routing_stats(model)[LAYER])
    layer = model.get_submodule(LAYER)
    overlap = torch.stack([one.overlap for one in each]).mean(0)
    apart = overlap.diagonal(APART)
    return {
        **record,
        "loss": loss_of(model, settings["training"], settings["reading"]),
        "overlap": overlap.tolist(),
        "apart": apart.mean().item(),
        "next": overlap.diagonal(1).mean().item(),
        "others": float(np.mean([_others(one, layer.topk).mean().item() for one in each])),
        "chance": layer.topk / layer.n_experts,
        "entropy": torch.stack([one.entropy for one in each]).mean().item(),
    }


def _others(stats: RoutingStats, chosen: int) -> Tensor:
    """(T,): the share of experts that two different tokens have in common in the same loop, in the mean over pairs."""
    tokens = stats.load.sum(1, keepdim=True) / chosen
    pairs = (stats.load * (stats.load - 1)).sum(1, keepdim=True) / (tokens * (tokens - 1))
    return (pairs / chosen).flatten()


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    found, limit = by_variant(results), settings["thresholds"]
    columns = ["variant", "seed", "loss", f"overlap t, t + {APART}", "t, t + 1", "other tokens, same loop", "chance"]
    columns += ["entropy of load"]
    rows = [
        [variant, seed] + [round(one[name], 4) for name in ("loss", "apart", "next", "others", "chance", "entropy")]
        for variant, seeds in found.items()
        for seed, one in seeds.items()
    ]
    figures: dict[str, float | None] = {
        f"{variant}_{name}": float(np.median([one[name] for one in seeds.values()]))
        for variant, seeds in found.items()
        for name in ("apart", "loss")
    }
    whole = next(iter(VARIANTS))
    if whole not in found:
        return Verdict(
            "undecided", f"The model with loop embedding and LoRA ({whole}) is missing.", figures, columns, rows
        )
    overlaps = [one["apart"] for one in found[whole].values()]
    median, chance = float(np.median(overlaps)), next(iter(found[whole].values()))["chance"]
    others = float(np.median([one["others"] for one in found[whole].values()]))
    base = figures[f"{whole}_loss"] or 0.0
    ablated = ", ".join(
        f"{variant} {figures[f'{variant}_apart']:.2f}"
        + ("" if abs((figures[f"{variant}_loss"] or 0.0) - base) <= limit["equal"] else " (at unequal loss)")
        for variant in found
        if variant != whole
    )
    because = (
        f"A token's experts in loops t and t + {APART} overlap by {median:.2f} (chance {chance:.2f}, other tokens in "
        "the "
        f"same loop {others:.2f}; rejected above {limit['overlap']}); range over {seeds_said(len(overlaps))} "
        f"{min(overlaps):.2f} to {max(overlaps):.2f}. Ablated: {ablated or 'not yet'}."
    )
    if median > limit["overlap"]:
        return Verdict("rejected", because, figures, columns, rows)
    return Verdict("holds" if set(found) == set(VARIANTS) else "undecided", because, figures, columns, rows)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    for variant, seeds in by_variant(results).items():
        matrices = [np.array(one["overlap"]) for one in seeds.values()]
        distances = np.arange(1, len(matrices[0]))
        curves = [[np.diagonal(matrix, d).mean() for d in distances] for matrix in matrices]
        axes.plot(distances, np.median(curves, axis=0), "o-", ms=4, label=variant)
        if variant == next(iter(VARIANTS)):
            one = next(iter(seeds.values()))
            axes.axhline(one["chance"], ls=":", color="grey", label="chance")
            axes.axhline(one["others"], ls="--", color="grey", label="other tokens, same loop")
    axes.axhline(settings["thresholds"]["overlap"], lw=0.8, color="tab:red", label="rejected above, at 4")
    axes.set(xlabel="loops apart", ylabel="share of experts in common", ylim=(0, 1))
    axes.legend(fontsize="small")


EXPERIMENT = Experiment(
    name="expert-overlap",
    number="E9",
    title="Experts over loops",
    claim="The router of a looped mixture of experts chooses other experts for a token in other loops.",
    rule="Rejected if, in the model with loop embedding and depth-wise LoRA, a token's expert sets in loops t and "
    "t + 4 overlap by more than 0.8 in the mean (median over seeds; chance is K / E). Ablations count beside "
    "it where their loss is within 0.02 nats.",
    limits="One looped layer of a small model, trained for a short time at a fixed depth. The loop embedding can "
    "only be left out with the injection that has it, so that ablation changes the injection as well. Other "
    "experts need not mean other work.",
    scales=SCALES,
    seeds=3,
    runs=runs,
    judge=judge,
    draw=draw,
)
