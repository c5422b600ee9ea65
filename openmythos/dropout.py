"""Dropout switched off for the calls of one thread, whatever the modules' flags say.

Generation must not drop. Nor may it change a model that other threads or generations use at the same time.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

_off: ContextVar[bool] = ContextVar("dropout_off", default=False)


def drops(drop: nn.Dropout) -> bool:
    """Whether calling this Dropout now would drop anything. Its own flag decides, not its parent's."""
    return drop.training and drop.p > 0 and not dropout_is_off()


def dropout_is_off() -> bool:
    """Whether the caller is inside `without_dropout`."""
    # A compiler cannot read a context variable; it sees the mode below.
    return not torch.compiler.is_compiling() and _off.get()


class without_dropout:
    """A context in which calls of `model` on this thread drop nothing. Reusable, not reentrant.

    The model's modules are listed at construction; flags and probabilities may change later.
    """

    def __init__(self, model: nn.Module):
        # Modules that may drop, with the attribute that says whether they do in training.
        self._watched = [(module, name) for module in model.modules() if (name := _probability(module))]

    def __enter__(self) -> None:
        self._token = _off.set(True)
        # Intercepting every PyTorch call takes time, so only if something would drop.
        self._mode = _NoDropout() if any(m.training and getattr(m, name) for m, name in self._watched) else None
        if self._mode is not None:
            self._mode.__enter__()

    def __exit__(self, *error) -> None:
        if self._mode is not None:
            self._mode.__exit__(*error)
        _off.reset(self._token)


class _NoDropout(TorchFunctionMode):
    """Makes dropout functions return their input, also in modules of other packages, adapters and compiled parts."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            return args[0] if args else kwargs["input"]
        place = _PROBABILITIES.get(func)
        if place is not None:
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


_FUNCTIONS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
}
# Functions with an argument dropout_p -> its position.
_PROBABILITIES = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
_QUIET = {nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity}
_OURS = ("openmythos", "openmythos_kernels")


def _probability(module: nn.Module) -> str:
    """The attribute that says whether calling this module itself may drop; empty if it never does."""
    if isinstance(module, _DropoutNd):
        return "p"
    if "dropout_p" in module.__dict__:  # grouped-query attention
        return "dropout_p"
    return "" if type(module) in _QUIET or _is_ours(module) else "training"


def _is_ours(module: nn.Module) -> bool:
    """Whether a module runs code of this project alone."""
    if "forward" in module.__dict__:
        return False
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] in _OURS:
            return True
        if any(callable(value) for name, value in vars(cls).items() if not name.startswith("__")):
            return False  # a subclass with methods of its own
    return False
