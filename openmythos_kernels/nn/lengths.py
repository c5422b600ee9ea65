"""How many tokens each row of a cache holds, on the device that reads it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

# In place of `to_device`, set by whoever keeps the lengths on the device itself (a CUDA graph does).
provider: ContextVar[Callable[[int], Tensor] | None] = ContextVar("lengths_provider", default=None)


def on_device(lengths: list[int], device: torch.device, layers: int = 1) -> Tensor:
    """(B,) int64, for so many layers that hold as many tokens, without waiting for the device."""
    if not torch.compiler.is_compiling() and (given := provider.get()) is not None:
        return given(layers)
    return to_device(lengths, device)


def to_device(lengths: list[int], device: torch.device) -> Tensor:
    """(B,) int64 of numbers that the host has, without waiting for the device."""
    if device.type == "cpu":
        return torch.tensor(lengths)
    if len(set(lengths)) == 1:
        return torch.full((len(lengths),), lengths[0], dtype=torch.int64, device=device)
    return torch.tensor(lengths, pin_memory=True).to(device, non_blocking=True)
