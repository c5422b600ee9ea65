"""A look at a model that tells cheaply, token by token, whether anything that guards judge has changed since."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """What a model consists of: classes, parts, hooks, methods of a module's own, where weights are, the configuration.

    Not the numbers in weights. Nor what else is in modules' attributes, such as a norm's eps, as long as there are as
    many of them.

    Args:
        weights: those whose memory is watched.
    """

    def __init__(self, model: Any, weights: Sequence[Tensor]):
        self._modules: list[nn.Module] = list(model.modules())
        self._states = [module.__dict__ for module in self._modules]
        self._tables = [state[name] for state in self._states for name in _TABLES if state[name]]
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        self._weights, self._settings = list(weights), vars(model.cfg)
        self._seen = self._look()
        self._parts, self._cfg = list(self._all_parts()), dict(self._settings)

    def unchanged(self) -> bool:
        """Whether the model is as it was; False also where it had hooks.

        A few passes over lists, without a line of Python for each module: there are hundreds.
        """
        return (
            not any(self._hooks)
            and self._look() == self._seen
            and sum(map(len, self._tables)) == len(self._parts)
            and all(map(is_, self._all_parts(), self._parts))
            and self._settings == self._cfg
        )

    def _look(self) -> tuple[list, list, list]:
        return list(map(type, self._modules)), list(map(len, self._states)), list(map(Tensor.data_ptr, self._weights))

    def _all_parts(self):
        return chain.from_iterable(map(dict.values, self._tables))
