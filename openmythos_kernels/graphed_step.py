"""`graphed_step(model, loss)`: forward and backward of a training step, captured once and replayed as a CUDA graph.

A step of a looped model is thousands of launches, and a GPU is done with many before Python has made the next
(docs/gpu.md). A graph is one launch. Nothing in it may wait for the host: within a capture every position runs every
loop, and what leaves early or shrinks the batch elsewhere does not (`nn/call.py`, `free_shapes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from openmythos import MoEFFN

Loss = Callable[..., Any]


@dataclass
class _Captured:
    """A graph with what it reads and writes, in memory that every replay uses again."""

    graph: Any  # a torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: Any
    gradients: list[tuple[nn.Parameter, Tensor]]
    loads: list[tuple[MoEFFN, Tensor]]


class GraphedStep:
    """See `graphed_step`.

    Attributes:
        refused: why steps run without a graph; empty while they need not.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, warmup: int = 3, most: int = 8):
        self._model, self._loss, self._warmup, self._most = model, loss, warmup, most
        self._layers = [m for m in model.modules() if isinstance(m, MoEFFN)]
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, _Captured] = {}
        self._places: list[int] = []  # of parameters and buffers when the first graph was captured
        self._stream: Any = None
        device = next(model.parameters()).device.type
        self.refused = "" if device == "cuda" else f"the model is on the {device}"

    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        """Runs a step. Returns what the loss function returns, without gradients; those of the parameters are in .grad,
        in place of what was there."""
        if self.refused:
            return self._eagerly(inputs, options)
        parameters = list(self._model.parameters())  # walking the modules is slow: once a step
        places = [x.data_ptr() for x in (*parameters, *self._model.buffers())]
        if places != self._places:  # weights moved: the graphs would read where they were
            self._graphs.clear()
            self._calls.clear()
            self._places = places
        key = self._key(parameters, inputs, options)
        if key in self._graphs:
            return self._replayed(self._graphs[key], parameters, inputs)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= self._warmup or len(self._graphs) >= self._most:
            return self._on_own_stream(inputs, options)
        captured = self._capture(inputs, options)
        if captured is None:
            return self._eagerly(inputs, options)
        self._graphs[key] = captured
        return self._replayed(captured, parameters, inputs)

    def _key(self, parameters: list[nn.Parameter], inputs: tuple[Tensor, ...], options: dict[str, Any]) -> tuple:
        """All that a capture depends on, but the numbers in tensors."""
        shapes = tuple((x.shape, x.dtype, x.device) for x in inputs)
        wanted = tuple([p.requires_grad for p in parameters])
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return shapes, tuple(sorted(options.items())), wanted, autocast, self._model.training

    def _eagerly(self, inputs, options) -> Any:
        for p in self._model.parameters():
            p.grad = None
        results = self._loss(self._model, *inputs, **options)
        loss = results if isinstance(results, Tensor) else results[0]
        loss.backward()
        return _mapped(Tensor.detach, results)

    def _on_own_stream(self, inputs, options) -> Any:
        """A step without a graph on the stream of captures: what PyTorch keeps for each stream is then there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = self._eagerly(inputs, options)
        torch.cuda.current_stream().wait_stream(self._stream)
        return results

    def _capture(self, inputs, options) -> _Captured | None:
        """A graph of a step, which has not run yet; None, with the reason in `refused`, if there can be none."""
        fixed = [x.clone() for x in inputs]
        counted = [(layer, layer.expert_load) for layer in self._layers]
        for layer in self._layers:
            layer.expert_load = None  # so that the graph counts the tokens of one step
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._graphs.values()), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                results = self._eagerly(fixed, options)
        except RuntimeError as error:
            self.refused = f"capture failed: {error}"
            return None
        finally:
            loads = [(layer, layer.expert_load) for layer in self._layers if layer.expert_load is not None]
            for layer, load in counted:
                layer.expert_load = load
        gradients = [(p, p.grad) for p in self._model.parameters() if p.grad is not None]
        return _Captured(graph, fixed, results, gradients, loads)

    def _replayed(self, captured: _Captured, parameters: list[nn.Parameter], inputs) -> Any:
        for fixed, given in zip(captured.inputs, inputs):
            fixed.copy_(given)
        captured.graph.replay()
        for p in parameters:
            p.grad = None
        for p, gradient in captured.gradients:
            p.grad = gradient
        for layer, load in captured.loads:
            layer.expert_load = load.clone() if layer.expert_load is None else layer.expert_load + load
        return _mapped(Tensor.clone, captured.results)


def _mapped(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    """`results` with the function applied to every tensor in tuples, lists and dicts."""
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, dict):
        return {name: _mapped(function, value) for name, value in results.items()}
    if isinstance(results, (tuple, list)):
        return type(results)(_mapped(function, value) for value in results)
    return results


def graphed_step(model: nn.Module, loss: Loss, *, warmup: int = 3, most: int = 8) -> GraphedStep:
    """A training step's forward and backward as one launch on a GPU.

        step = graphed_step(model, lambda model, ids, targets, n_loops: loss_of(model(ids, n_loops), targets))
        for ids, targets in batches:
            loss = step(ids, targets, n_loops=4)
            optimizer.step()

    Clipping, the optimizer and its schedule stay outside: they may depend on the host. For each combination of input
    shapes and options the first `warmup` calls run eagerly, the next one captures; later ones copy their inputs and
    replay. Outputs and gradients are those of the eager step in which every position runs every loop; the gradients'
    memory is used again by the next step. Dropout and random initial states draw from PyTorch's generator of the GPU,
    which replays advance. Loads of experts are counted for `update_router_bias`. A model that is on a CPU or cannot be
    captured runs eagerly, and `refused` says why.

    Args:
        model: `openmythos`, accelerated or not, or what wraps it. If its weights move, graphs are captured again.
        loss: (model, *inputs, **options) -> the loss, or a tuple that begins with it; tensors in tuples, lists and
            dicts are returned. It must not read tensors on the host.
        warmup: eager calls before a capture. DistributedDataParallel needs 11, and to be built on a side stream.
        most: graphs at most, e.g. one for each sampled number of loops; other combinations run eagerly.

    Returns:
        A function (*inputs, **options); options must be hashable.

    Source: "CUDA graphs" in PyTorch's notes, whole-network capture.
    """
    return GraphedStep(model, loss, warmup=warmup, most=most)
