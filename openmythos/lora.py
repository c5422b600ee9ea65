"""Depth-wise LoRA: the weights that differ between loops."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


class LoRAAdapter(nn.Module):
    """Depth-wise LoRA (Bae et al., 2024): `(down(x) * scale[t]) @ B`, with one scale vector per loop."""

    def __init__(self, dim: int, rank: int, max_loops: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.B = nn.Parameter(torch.randn(rank, dim) * 0.02)
        self.scale = nn.Embedding(max_loops, rank)

    def hidden(self, x: Tensor, loop_t: int) -> Tensor:
        """The low-rank activations of loop `loop_t`, scaled: (..., dim) -> (..., rank)."""
        # Loops past the trained depth reuse the last trained scale.
        last = self.scale.num_embeddings - 1
        return self.down(x) * self.scale(torch.full((), min(loop_t, last), device=x.device))

    def forward(self, x: Tensor, loop_t: int) -> Tensor:
        """(..., dim) -> (..., dim): what loop `loop_t` adds to the block's output x."""
        return self.hidden(x, loop_t) @ self.B
