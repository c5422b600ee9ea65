"""Mixture-of-experts FFN (DeepSeekMoE) and its load balancing (DeepSeek-V3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from openmythos.compat import is_fake, is_transform_wrapper, without_grad_levels
from openmythos.config import MythosConfig
from openmythos.dropout import dropout_is_off
from openmythos.layers import Expert, at_least_fp32, recomputing


class MoEFFN(nn.Module):
    """Top-K routed experts, plus shared experts that see every token (DeepSeekMoE, Dai et al., 2024).

    `router_bias` shifts which experts are chosen. It is no part of topk_weights, so it needs no gradient:
    `update_router_bias` moves it. It stays in float32 (float64) when the layer is cast to 16 bits, where steps of 1e-3
    would round to none. No token is ever dropped.

    Attributes:
        expert_load: (E,) int64, tokens routed to each expert since the last bias update, counted in training.
        choices: the chosen experts of every call, (N, K) int64 each, while `recording_routing` is on.
        recorded: the `choices` of the last `recording_routing`.
        idle_experts: the gradient of an expert without a token: "zeros", or "none" as in open-mythos.
        scores: is given the router's logits while `openmythos.balance.recording_scores` is on.
        exchange: sends tokens to the ranks that hold their experts (`openmythos.parallel`); None: all experts are here.
    """

    # Not a buffer: DDP broadcasts buffers, which would overwrite the counts of the other ranks.
    expert_load: Tensor | None = None
    choices: list[Tensor] | None = None
    recorded: list[Tensor] | None = None
    idle_experts: str = "zeros"
    exchange: Any = None
    scores: Any = None

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        self.n_experts = cfg.n_experts
        self.n_shared = cfg.n_shared_experts
        self.topk = cfg.n_experts_per_tok
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.router_bias: Tensor
        self.register_buffer("router_bias", at_least_fp32(torch.zeros(cfg.n_experts)))
        self.routed_experts = nn.ModuleList(Expert(cfg.dim, cfg.expert_dim) for _ in range(cfg.n_experts))
        shared_dim = cfg.expert_dim * cfg.n_experts_per_tok
        self.shared_experts = nn.ModuleList(Expert(cfg.dim, shared_dim) for _ in range(cfg.n_shared_experts))

    def _apply(self, fn, recurse=True):
        before = self._buffers.get("router_bias")
        super()._apply(fn, recurse)
        now = self._buffers.get("router_bias")
        if before is not None and now is not None and _is_wide(before) and not _is_wide(now):
            self._buffers["router_bias"] = before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        key, held = prefix + "router_bias", self._buffers.get("router_bias")
        if key in state_dict and held is not None and _is_wide(held) and not _is_wide(state_dict[key]):
            state_dict = {**state_dict, key: at_least_fp32(state_dict[key])}  # `assign=True` would take it as it is
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses experts for tokens (N, dim).

        Returns:
            expert_idx (N, K) int64, and topk_weights (N, K) in flat's dtype: the softmax over the chosen logits, which
            equals the full softmax renormalized over the chosen experts.
        """
        logits = self.router(flat)
        expert_idx = (logits + self.router_bias).topk(self.topk, dim=-1).indices
        scores = getattr(self, "scores", None)  # formulas route with what has a router and little else
        if scores is not None:
            scores.add(self, logits, expert_idx)
        topk_weights = logits.gather(-1, expert_idx).softmax(-1)
        return expert_idx, topk_weights.to(flat.dtype)

    def record_load(self, expert_idx: Tensor, load: Tensor | None = None) -> None:
        """Adds the routed tokens to `expert_load` in training, and to `choices` within `recording_routing`.

        A forward adds nothing if the backward pass runs it again, if it is exported, or on fake tensors.

        Args:
            expert_idx: (N, K), as from `route`.
            load: (E,) int64, tokens per expert, if already counted.
        """
        counted = self.training and not dropout_is_off()  # not generating
        if not (counted or self.choices is not None) or recomputing():
            return
        chosen = _numbers(expert_idx.detach())
        if chosen is None:
            return
        if self.choices is not None:
            self.choices.append(chosen)
        if not counted:
            return
        if load is None:
            load = torch.zeros(self.n_experts, dtype=torch.int64, device=expert_idx.device)
            load.scatter_add_(0, expert_idx.flatten(), torch.ones_like(expert_idx).flatten())
        if self.expert_load is not None and self.expert_load.device == load.device:
            load = load + self.expert_load
        self.expert_load = _numbers(load)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        flat = x.reshape(-1, x.shape[-1])
        expert_idx, topk_weights = self.route(flat)
        self.record_load(expert_idx)
        if self.exchange is None:
            out = self.routed(flat, expert_idx, topk_weights)
        else:
            out = self.exchange(self.routed, flat, expert_idx, topk_weights)
        for expert in self.shared_experts:
            out = out + expert(flat)
        return out.view_as(x)

    def routed(self, flat: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum (N, dim) of the routed experts that are here; expert_idx (N, K) numbers them from 0."""
        out = torch.zeros_like(flat)
        zeros = torch.is_grad_enabled() and (self.idle_experts == "zeros" or self.exchange is not None)
        for e, expert in enumerate(self.routed_experts):
            token, slot = torch.where(expert_idx == e)
            # With gradients an expert without tokens takes part, too: its weights get a zero gradient. FSDP reduces
            # what has a gradient, and hangs if the ranks disagree about which parameters have one.
            if token.numel() or zeros:
                y = topk_weights[token, slot].unsqueeze(-1) * expert(flat[token])
                out = out.index_add(0, token, y.to(out.dtype))
        return out


def _is_wide(x: Tensor) -> bool:
    return at_least_fp32(x) is x


def _numbers(chosen: Tensor) -> Tensor | None:
    """`chosen` as a plain tensor to keep, unwrapped from `torch.func` transforms.

    None if it has no numbers (fake tensors) or they must not outlive the call (tracing, export).
    """
    if torch.compiler.is_exporting():
        return None  # an exported graph may not write to the module
    if torch.compiler.is_dynamo_compiling():
        return chosen  # kept when the graph runs
    chosen = without_grad_levels(chosen)
    return None if torch.jit.is_tracing() or is_fake(chosen) or is_transform_wrapper(chosen) else chosen


@torch.no_grad()
def update_router_bias(model: nn.Module, rate: float = 1e-3) -> None:
    """Moves every router bias toward balance: `bias += rate * sign(mean_load - load)`.

    Call it after an optimizer step (DeepSeek-V3's balancing without an auxiliary loss). The load is counted since the
    last call and summed over all ranks, so every rank must call it. A layer that saw no token on any rank is unchanged.
    """
    for module in model.modules():
        if not isinstance(module, MoEFFN):
            continue
        load = module.expert_load
        if load is None:
            load = torch.zeros(module.n_experts, dtype=torch.int64, device=module.router_bias.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        load = load.double()
        if not _is_wide(module.router_bias):  # another package cast the model to 16 bits
            module.router_bias = at_least_fp32(module.router_bias)
        module.router_bias += (rate * torch.sign(load.mean() - load)).to(module.router_bias)
        module.expert_load = None
