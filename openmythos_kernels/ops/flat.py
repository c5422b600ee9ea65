"""Arguments and results with lists of tensors spread out, as autograd follows tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Layout = tuple[int | None, ...]


def flatten(args: Sequence[Any]) -> tuple[list[Any], Layout]:
    """The items with lists spread out, and per item None or the list's length."""
    flat, layout = [], []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            flat.extend(arg)
            layout.append(len(arg))
        else:
            flat.append(arg)
            layout.append(None)
    return flat, tuple(layout)


def unflatten(flat: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
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
    """Plain loops: this runs at every call of an op in training."""
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and any(isinstance(item, Tensor) and item.requires_grad for item in arg):
            return True
    return False


def savable(x: Any) -> Any:
    """x as autograd can save it: of a tensor that was made in inference mode a copy."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x
