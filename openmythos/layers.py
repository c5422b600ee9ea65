"""RMSNorm, rotary embedding and the SwiGLU expert."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openmythos.compat import backward_pass


def at_least_fp32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64: for what low precision would spoil."""
    return x if x.dtype == torch.float64 else x.float()


def recomputing() -> bool:
    """Whether a backward pass is running this forward again, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and backward_pass() != -1


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang & Sennrich, 2019).

    The arithmetic is float32 (float64 for float64 x); the result has x's dtype and shape (..., dim).
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rotary_table(dim: int, max_len: int, theta: float = 500000.0) -> Tensor:
    """Unit phasors `exp(i * pos * theta^(-2k/dim))`, complex64 of shape (max_len, dim // 2)."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(max_len, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


precompute_rope_freqs = rotary_table  # open-mythos' name


def apply_rope(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates the channels 2k and 2k + 1 of x by the phasor of its position.

    Args:
        x: (B, T, heads, d), d even.
        freqs_cis: complex (T, d // 2), or (B, T, d // 2) for rows at different positions.

    Returns:
        The rotated x, same shape and dtype. The arithmetic is float32 (float64 for float64 x).
    """
    phasor = torch.view_as_real(freqs_cis).unsqueeze(-3)  # (..., T, 1, d // 2, 2)
    cos, sin = phasor.unbind(-1)
    even, odd = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class Expert(nn.Module):
    """SwiGLU feed-forward: `down(silu(gate(x)) * up(x))`, (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, expert_dim: int):
        super().__init__()
        self.gate = nn.Linear(dim, expert_dim, bias=False)
        self.up = nn.Linear(dim, expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
