"""Mixture-of-experts layers with fixed routing, and arguments of `moe_experts`."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch

import openmythos.moe


class Fixed(openmythos.moe.MoEFFN):
    """The reference with fixed routing, `idx` and `topk_weights`."""

    def route(self, flat):
        return self.idx, self.topk_weights


def make(N, D, I, E, K, S, dtype=torch.float32, routing="random", seed=0):
    """A reference layer with fixed routing, and x, in float64; `dtype` can represent every value."""
    gen = torch.Generator().manual_seed(seed)
    config = SimpleNamespace(dim=D, n_experts=E, n_shared_experts=S, n_experts_per_tok=K, expert_dim=I)
    layer = Fixed(config).double().eval()
    for p in layer.parameters():
        p.data = (torch.randn(p.shape, generator=gen, dtype=torch.float64) * p.shape[-1] ** -0.5).to(dtype).double()
    if routing == "one expert":  # every pair; the other experts get no token
        layer.idx = torch.full((N, K), E - 1)
    elif routing == "few experts":
        layer.idx = torch.rand(N, min(E, K), generator=gen).argsort(-1)
    else:
        layer.idx = torch.rand(N, E, generator=gen).argsort(-1)[:, :K].contiguous()
    layer.topk_weights = torch.rand(N, K, generator=gen, dtype=torch.float64).softmax(-1).to(dtype).double()
    return layer, torch.randn(N, D, generator=gen, dtype=torch.float64).to(dtype).double()


def lists(layer):
    """The six lists of weights that the op takes."""
    return [
        [getattr(e, part).weight for e in experts]
        for experts in (layer.routed_experts, layer.shared_experts)
        for part in ("gate", "up", "down")
    ]


def cast(layer, x, dtype, grad):
    """Copies of layer and x in another dtype, as leaves."""
    layer = copy.deepcopy(layer).to(dtype)
    layer.topk_weights = layer.topk_weights.to(dtype).requires_grad_(grad)
    return layer, x.to(dtype).requires_grad_(grad)
