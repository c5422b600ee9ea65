"""Arguments and results with lists of tensors flattened, as autograd follows tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Layout = tuple[int | None, ...]


def flatten(args: Sequence[Any]) -> tuple[list[Any], Layout]:
    """The items with lists flattened, and per item the list's length, or None for what is no list."""
    flat: list[Any] = []
    layout: list[int | None] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            flat.extend(arg)
            layout.append(len(arg))
        else:
            flat.append(arg)
            layout.append(None)
    return flat, tuple(layout)


def unflatten(flat: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
    """The inverse of `flatten`."""
    args, at = [], 0
    for length in layout:
        if length is None:
            args.append(flat[at])
            at += 1
        else:
            args.append(list(flat[at : at + length]))
            at += length
    return tuple(args)


def any_requires_grad(args: Sequence[Any]) -> bool:
    """True if a tensor requires gradients. Plain loops: every op asks at every call in training."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and any(isinstance(item, Tensor) and item.requires_grad for item in arg):
            return True
    return False


def savable(x: Any) -> Any:
    """x in a form that autograd can save: a copy if x was made in inference mode."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
