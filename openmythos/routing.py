"""Statistics of routing: how tokens spread over experts, and whether loops choose the same ones.

with recording_routing(model):
    model(ids, n_loops=8)
stats = routing_stats(model)["recurrent.block.ffn"]
stats.overlap[0, 1]  # share of a token's experts in loop 0 that loop 1 chose again
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from openmythos.moe import MoEFFN


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of one layer over its T calls, one a loop if the layer is looped. All on the layer's device.

    Attributes:
        load: (T, E) int64, tokens per expert.
        entropy: (T,), entropy of the load divided by log E: 1 if all experts get the same, 0 if one gets all.
        overlap: (T, T), the share of a token's K experts that two calls have in common, averaged over tokens. 1 on the
            diagonal, K / E for independent choices. NaN if the calls had different tokens, as after sequences have
            left the batch.
    """

    load: Tensor
    entropy: Tensor
    overlap: Tensor


@contextmanager
def recording_routing(model: nn.Module) -> Iterator[None]:
    """A context in which every MoE layer of `model` records the experts it chooses, for `routing_stats`.

    It takes 8 K bytes per token and call on the layer's device. The record stays until the context is entered again.
    """
    layers = [module for module in model.modules() if isinstance(module, MoEFFN)]
    for layer in layers:
        layer.choices, layer.recorded = [], None
    try:
        yield
    finally:
        for layer in layers:
            layer.recorded, layer.choices = layer.choices, None


def routing_stats(model: nn.Module) -> dict[str, RoutingStats]:
    """Statistics of the last `recording_routing`, by layer name; layers that were not called are left out.

    They are computed on the device; only reading a value waits for it.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoEFFN) and (calls := layer.choices or layer.recorded):
            found[name] = _stats(calls, layer.n_experts)
    return found


def _stats(calls: list[Tensor], experts: int) -> RoutingStats:
    # (N, E) for each call: 1 where a token chose the expert.
    chosen = [torch.zeros(len(c), experts, device=c.device).scatter_(1, c, 1.0) for c in calls]
    load = torch.stack([c.sum(0).long() for c in chosen])
    share = load / load.sum(1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(1) / math.log(experts) if experts > 1 else torch.ones_like(share[:, 0])
    overlap = torch.full((len(calls), len(calls)), math.nan, device=load.device)
    for t, a in enumerate(chosen):
        for s, b in enumerate(chosen):
            if a.shape == b.shape and a.numel():
                overlap[t, s] = (a * b).sum() / a.sum()
    return RoutingStats(load, entropy, overlap)


def plot_routing(stats: RoutingStats, path: str | Path) -> None:
    """Draws a layer's load and overlap, loop by loop, to a file whose suffix gives the format. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    share = (stats.load / stats.load.sum(1, keepdim=True).clamp(min=1) * stats.load.shape[1]).cpu()
    image = left.imshow(share.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    left.set(title="tokens per expert, 1 = fair share", xlabel="expert", ylabel="loop")
    figure.colorbar(image, ax=left)
    image = right.imshow(stats.overlap.cpu().numpy(), interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    right.set(title="experts two loops share", xlabel="loop", ylabel="loop")
    figure.colorbar(image, ax=right)
    figure.savefig(path)
