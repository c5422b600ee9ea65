"""The debug switch: checks that cost too much to run always.

`OPENMYTHOS_DEBUG=1` sets it when the package is imported; `openmythos.debug.on = True` sets it later.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from openmythos.compat import capturing, fake_mode_active, transformed

on = os.environ.get("OPENMYTHOS_DEBUG", "") not in ("", "0")


def check_states(where: str, states: Tensor) -> None:
    """With the switch on, checks that states (..., dim) are finite; on a GPU the host waits for them.

    Nothing is checked where numbers cannot be read: in a graph that is compiled, traced or captured, on fake tensors,
    and under a function transform.

    Raises:
        FloatingPointError: naming `where`, and how many positions have NaN or infinite numbers.
    """
    if not on or not _readable(states):
        return
    wrong = ~states.detach().isfinite().all(-1)
    if count := int(wrong.sum()):
        raise FloatingPointError(f"{where}: NaN or infinity at {count} of {wrong.numel()} positions")


def check_values(name: str, values: Tensor, right: Callable[[Tensor], Tensor], expected: str) -> None:
    """With the switch on, checks an argument's integers: what kernels on a GPU cannot report. The host waits for them.

    Nothing is checked where numbers cannot be read, as in `check_states`.

    Args:
        name: of the argument. values: integers of any shape.
        right: `(values) -> bool tensor` of the same shape. expected: the same in words.

    Raises:
        ValueError: naming the argument, the first wrong value and its place.
    """
    if not on or not _readable(values):
        return
    wrong = (~right(values)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(f"{name}: got {int(values[tuple(place)])} at {place}, must be {expected}")


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed() or x.is_meta or fake_mode_active(x):
        return False
    return not capturing(x.device)
