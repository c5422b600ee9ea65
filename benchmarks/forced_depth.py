"""A model whose tokens halt at depths that one chooses, by its weights alone: nothing in the code is replaced.

One channel carries the decision. The embedding of each token holds there what makes ACT's probability the same in every
loop; no layer writes to the channel or reads it, and the injection restores it in every loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CHANNEL, GAIN = 0, 100.0


@torch.no_grad()
def force_depths(model: nn.Module, depths: Tensor) -> None:
    """Makes every position of token i run depths[i] loops (or all, if these are fewer).

    Args:
        model: an OpenMythos with injection="mythos" and act_threshold 0.99.
        depths: (vocab_size,) int64, at least 1.
    """
    assert model.cfg.injection == "mythos" and model.cfg.act_threshold == 0.99
    recurrent = model.recurrent
    for block in [*model.prelude, *model.coda, *recurrent.block.modules()]:
        if hasattr(block, "attn_norm"):
            block.attn_norm.weight[CHANNEL] = block.ffn_norm.weight[CHANNEL] = 0
            block.attn.wo.weight[CHANNEL] = 0
    for name, weight in model.named_parameters():
        if name.endswith("down.weight") and len(weight) == model.cfg.dim:  # of experts and dense layers
            weight[CHANNEL] = 0
    model.norm.weight[CHANNEL] = recurrent.norm.weight[CHANNEL] = 0
    recurrent.injection.log_A[CHANNEL] = 20.0  # no memory: the state is what the prelude says
    recurrent.injection.B[CHANNEL] = 1.0
    if recurrent.lora is not None:
        recurrent.lora.B[:, CHANNEL] = 0
    recurrent.act.halt.weight.zero_()
    recurrent.act.halt.bias.zero_()
    recurrent.act.halt.weight[0, CHANNEL] = GAIN
    # The sum of p passes 0.99 in the middle of loop number `depth`.
    p = 0.99 / (depths.double() - 0.5).clamp_min(0.995)
    model.embed.weight[:, CHANNEL] = (p / (1 - p)).log().div(GAIN).to(model.embed.weight.dtype)


def geometric_depths(tokens: int, mean: float, limit: int, seed: int = 0) -> Tensor:
    """(tokens,) int64: depths of a geometric distribution with this mean, cut off at `limit`, in random order.

    They are its quantiles, so that the mean hardly depends on the seed.
    """
    quantiles = (torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens
    depths = (torch.log1p(-quantiles) / math.log(1 - 1 / mean)).floor().long() + 1
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return depths.clamp(max=limit)[order]
