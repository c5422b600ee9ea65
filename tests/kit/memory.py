"""Hostile memory: new memory reads as NaN, and writes beside an input are noticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

_GUARD = 64  # elements before and after an input: at least 64 bytes, which keeps its alignment


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills all new memory, that of at::empty in C++ included, with NaN, the largest integer or True.

    It is automatic in every folder whose conftest.py imports it.
    """
    with poison():
        yield


class poison:
    """`poisoned_memory` as a context manager."""

    def __enter__(self):
        self._before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")

    def __exit__(self, *error):
        self._warnings.__exit__(*error)
        torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])


class Guarded:
    """Copies each input into a larger block of memory, in a given layout.

    The rest of the block is NaN (or the largest integer, or True), so that it shows in a result if it is read.
    `untouched` checks that neither the inputs nor the rest was written to.
    """

    def __init__(self, layout: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self._layout = layout
        self._memory: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: self._placed(name, value) for name, value in inputs.items()}

    def _placed(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._placed(f"{name}[{i}]", item) for i, item in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        memory, view = self._layout(value)
        view.copy_(value)
        self._memory.append((name, memory, memory.clone()))
        return view

    def untouched(self) -> None:
        """Raises AssertionError if an input or the memory beside it was written to."""
        for name, memory, before in self._memory:
            differs = memory.view(torch.uint8) != before.view(torch.uint8)
            if differs.any():
                raise AssertionError(f"{int(differs.sum())} bytes in or beside the memory of {name} were written")


def dense(x: Tensor) -> tuple[Tensor, Tensor]:
    memory = _filled(x.numel() + 2 * _GUARD, x)
    return memory, memory[_GUARD : _GUARD + x.numel()].view(x.shape)


def misaligned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, starting one element after an aligned address."""
    memory = _filled(x.numel() + 2 * _GUARD, x)
    return memory, memory[_GUARD + 1 : _GUARD + 1 + x.numel()].view(x.shape)


def strided(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every second element of the last dimension."""
    memory = _filled(2 * x.numel() + 2 * _GUARD, x)
    if x.dim() == 0:
        return memory, memory[_GUARD]
    return memory, memory[_GUARD : _GUARD + 2 * x.numel()].view(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


def turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """With the first two dimensions swapped in memory."""
    if x.dim() < 2:
        return strided(x)
    memory = _filled(x.numel() + 2 * _GUARD, x)
    shape = (x.shape[1], x.shape[0], *x.shape[2:])
    return memory, memory[_GUARD : _GUARD + x.numel()].view(shape).transpose(0, 1)


LAYOUTS = (dense, misaligned, strided, turned)


def _filled(size: int, like: Tensor) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        value = float("nan")
    else:
        value = True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full((size,), value, dtype=like.dtype, device=like.device)
