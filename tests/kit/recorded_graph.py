"""A stand-in for CUDA graphs on a CPU: records the operators of a region, and runs the same operators again.

As in a CUDA graph a replay reads and writes the memory of the capture, and everything that the host decided stays
decided. An operator whose result the host reads is an error in both.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.calls: list[tuple] = []

    def pool(self):
        return None

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, named, results in self.calls:
                returns = function._schema.returns
                if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
                    continue  # a view, which sees what its base holds
                again = function(*args, **named)
                for old, new in zip(tree_leaves(results), tree_leaves(again)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        self.bounds: tuple = ()  # a model reads those of token ids, on a CPU alone

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = kwargs or {}
        name = function.overloadpacket.__name__.split(".")[-1]
        if name in _READS and not any(args[0] is bound for bound in self.bounds):
            raise RuntimeError(f"the host reads what {function} finds")
        results = function(*args, **named)
        if name == "aminmax":
            self.bounds = results
        self.graph.calls.append((function, args, named, results))
        return results


@contextlib.contextmanager
def graph(captured: Graph, pool=None, stream=None):
    """Stands for `torch.cuda.graph`."""
    capturing = lambda device: True  # noqa: E731
    with (
        mock.patch("openmythos.compat.capturing", capturing),
        mock.patch("openmythos.recurrence.capturing", capturing),
        mock.patch.object(Tensor, "tolist", _refused),
        _Recording(captured),
    ):
        yield


def _refused(self):
    raise RuntimeError("the host reads a tensor by tolist")


@contextlib.contextmanager
def on_cpu():
    """Within, graphs of `torch.cuda` are those of this file, and streams do nothing."""
    stream = mock.MagicMock()
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        mock.patch.object(torch.cuda, "graph", graph),
        mock.patch.object(torch.cuda, "Stream", lambda: stream),
        mock.patch.object(torch.cuda, "current_stream", lambda: stream),
        mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()),
    ):
        yield
