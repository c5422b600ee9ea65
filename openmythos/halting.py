"""Adaptive computation time (ACT; Graves, 2016): every position decides after how many loops it halts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from openmythos.layers import at_least_fp32


class ACTHalting(nn.Module):
    """The halting probability of each position: `sigmoid(halt(h))`."""

    def __init__(self, dim: int):
        super().__init__()
        self.halt = nn.Linear(dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, dim) -> probability (B, T), in float32 (float64 for float64 h)."""
        halt = self.halt
        plain = type(halt) is nn.Linear and type(halt.weight) in (nn.Parameter, Tensor)
        if not plain or "forward" in halt.__dict__ or halt._forward_pre_hooks or halt._forward_hooks:
            return torch.sigmoid(halt(h)).squeeze(-1)  # an adapter, a quantized layer, a hooked or wrapped one
        wide = at_least_fp32(h)
        # Not a Linear call: autocast would run it in low precision.
        logit = (wide * self.halt.weight[0]).sum(-1) + self.halt.bias
        return torch.sigmoid(logit)


class ACTState(NamedTuple):
    """ACT's bookkeeping, handed from loop to loop.

    With p the halting probabilities of the loops so far and R the probability that was left before the last of them:

    Attributes:
        h_out: (B, T, dim) in the dtype of h, the sum of the states so far, each weighted by its p (by R where the
            position halted).
        cumulative_p: (B, T) float32 or float64, the sum of p.
        running: (B, T) bool, True until cumulative_p reaches the threshold.
        ponder: (B, T) in the dtype of cumulative_p, the ponder cost N + R: the number of loops run, plus R.
    """

    h_out: Tensor
    cumulative_p: Tensor
    running: Tensor
    ponder: Tensor

    @staticmethod
    def start(h: Tensor) -> ACTState:
        """The state before the first loop: every position runs and nothing is summed yet."""
        zero = at_least_fp32(h.new_zeros(h.shape[:2]))
        return ACTState(torch.zeros_like(h), zero, torch.ones_like(zero, dtype=torch.bool), zero)


def act_update(state: ACTState, h: Tensor, p: Tensor, t: int, threshold: float, spend_remainder: bool) -> ACTState:
    """ACT's bookkeeping for loop t.

    A running position adds p * h. A position that crosses the threshold adds (1 - cumulative_p) * h instead and halts.
    A halted position adds nothing.

    Args:
        state: the state before loop t.
        h: (B, T, dim), the recurrent state after loop t.
        p: (B, T), the halting probabilities of loop t.
        threshold: cumulative probability at which a position halts.
        spend_remainder: give h the whole remainder at every running position, for the last loop.
    """
    left = 1.0 - state.cumulative_p
    crossed = state.cumulative_p + p >= threshold
    weight = (left.clamp(min=0) if spend_remainder else torch.where(crossed, left.clamp(min=0), p)) * state.running
    h_out = (state.h_out + weight.unsqueeze(-1) * h).to(h.dtype)
    # N = t + 1 loops so far; R is what was left before the last of them.
    ponder = torch.where(state.running, t + 1 + left, state.ponder)
    cumulative_p = state.cumulative_p + p * state.running
    return ACTState(h_out, cumulative_p, state.running & (cumulative_p < threshold), ponder)
