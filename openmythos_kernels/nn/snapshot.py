"""A look at a model that tells cheaply, call by call, whether anything that guards judge has changed since."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from openmythos_kernels.nn.guards import patched_classes

_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Numbers that no op reads: the weights have these sizes, and whether dropout drops is asked at every call.
_IGNORED = {"training", "in_features", "out_features", "num_embeddings", "embedding_dim", "call_super_init"}
_END = object()


class Snapshot:
    """What a model consists of: classes, parts, methods of a module's own, numbers in attributes such as a norm's eps,
    where weights are, the configuration. Not the numbers in weights.

    Keeps the model's parts alive, not the model itself.
    """

    def __init__(self, model: Any):
        self._root_type = type(model)
        modules: list[nn.Module] = list(model.modules())
        self._modules = modules[1:]
        self._states = [module.__dict__ for module in modules]
        # A list may get its first block; of another module nobody reads a part that it did not have.
        self._tables = [
            state[name]
            for module, state in zip(modules, self._states)
            for name in _TABLES
            if state[name] or isinstance(module, nn.ModuleList)
        ]
        self._hooks = [state[name] for state in self._states for name in _HOOKS]
        self._weights = [weight for weight in model.parameters() if type(weight) in (nn.Parameter, Tensor)]
        numbers = [
            (state, name)
            for state in self._states
            for name, value in state.items()
            if type(value) in (int, float, bool, str) and name not in _IGNORED
        ]
        self._owners, self._names = [owner for owner, _ in numbers], [name for _, name in numbers]
        self._settings = vars(model.cfg)
        self._seen = self._look()
        self._parts, self._cfg = list(self._all_parts()), dict(self._settings)

    def unchanged(self, model: Any) -> bool:
        """Whether the model is as it was, hooks aside.

        A few passes over lists, without a line of Python for each module: there are hundreds.
        """
        return (
            type(model) is self._root_type
            and model.__dict__ is self._states[0]
            and all(map(is_, self._all_parts(), self._parts))
            and self._settings == self._cfg
            and self._look() == self._seen
        )

    def hooked(self) -> bool:
        """Whether the model or a part of it has hooks."""
        return any(self._hooks)

    def _look(self) -> tuple:
        return (
            list(map(type, self._modules)),
            list(map(len, self._states)),
            list(map(Tensor.data_ptr, self._weights)),
            all(map(Tensor.is_contiguous, self._weights)),
            list(map(dict.get, self._owners, self._names)),
            dict(patched_classes()),
        )

    def _all_parts(self):
        """The parts and an end, so that one more or one less is seen, too."""
        return chain(chain.from_iterable(map(dict.values, self._tables)), (_END,))
