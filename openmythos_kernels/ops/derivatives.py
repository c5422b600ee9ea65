"""Derivatives that kernels do not have: second ones, forward mode, and those under function transforms.

A kernel computes values and first derivatives. Everything else comes from an op's formula: the same results by
PyTorch's own operators and the functions of `openmythos`, which PyTorch can differentiate any number of times and in
any mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from openmythos.compat import forward_mode_open, in_transform, in_vmap, tracing_with_jit, transformed
from openmythos_kernels.ops.flat import Layout, any_requires_grad, flatten, unflatten

Formula = Callable[..., tuple]


def needs_formula(args: Sequence[Any]) -> bool:
    """True if the arguments carry what a kernel would drop: tangents or batch dimensions."""
    if in_vmap():
        return True
    if not forward_mode_open():
        return False
    # Inside a transform the tangents are hidden in wrappers.
    return in_transform() or any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in flatten(args)[0]
    )


def by_formula(formula: Formula, args: Sequence[Any]) -> tuple:
    """formula(*args) without autocast, so that it computes in its arguments' dtypes, as kernels do."""
    device = next(x.device.type for x in flatten(args)[0] if isinstance(x, Tensor))
    with _without_autocast(device):
        return formula(*args)


def uncast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward(ctx, *grads)` without autocast, so that it computes in its tensors' dtypes whenever it runs."""

    @wraps(backward)
    def alike(ctx, *grads):
        device = next((grad.device.type for grad in grads if grad is not None), "cpu")
        with _without_autocast(device):
            return backward(ctx, *grads)

    return alike


def _without_autocast(device: str):
    """A context. It costs nothing where autocast is off; autocast does not know the device "meta"."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def saves(tensors: Sequence[Any]) -> bool:
    """True if an op with these arguments must keep what its backward reads. A traced graph may be trained later, even
    if it was traced without gradients."""
    return (torch.is_grad_enabled() or tracing_with_jit()) and any_requires_grad(tensors)


class Again:
    """A function computed by kernels that has derivatives of every order and mode.

    Args:
        kernel: `(*args) -> tuple` of tensors and lists of tensors; args are the same, numbers and None.
        formula: the same in differentiable operators, evaluated where derivatives of the results are asked for.
    """

    def __init__(self, kernel: Formula, formula: Formula):
        self._kernel, self._formula = kernel, formula
        self._function = _function(kernel, formula)

    def __call__(self, *args: Any) -> tuple:
        if torch.compiler.is_compiling():
            return self._kernel(*args)
        if transformed() and needs_formula(args):
            return by_formula(self._formula, args)
        if not (torch.is_grad_enabled() and any_requires_grad(args)):
            return self._kernel(*args)
        flat, layout = flatten(args)
        layouts = _Layouts(layout)
        return unflatten(self._function.apply(layouts, *flat), layouts.results)


class _Layouts:
    """The layouts of a call's arguments and, once it has run, of its results. An object, as `torch.func` would take a
    list apart."""

    def __init__(self, arguments: Layout):
        self.arguments, self.results = arguments, ()


def _function(kernel: Formula, formula: Formula) -> type[torch.autograd.Function]:
    """The autograd.Function of `Again`, called with the arguments' `_Layouts` and the flat arguments."""

    class AgainFunction(torch.autograd.Function):
        @staticmethod
        def forward(layouts, *flat):
            found, layouts.results = flatten(kernel(*unflatten(flat, layouts.arguments)))
            return tuple(found)

        @staticmethod
        def setup_context(ctx, inputs, output):
            layouts, *flat = inputs
            ctx.layout = layouts.arguments
            ctx.rest = [None if isinstance(x, Tensor) else x for x in flat]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in flat))

        @staticmethod
        @uncast
        def backward(ctx, *grads):
            flat = [rest if x is None else x for x, rest in zip(ctx.saved_tensors, ctx.rest)]
            wanted, graph = ctx.needs_input_grad[1:], torch.is_grad_enabled()
            return None, *_pulled_back(
                lambda *inner: formula(*unflatten(inner, ctx.layout)), flat, wanted, grads, graph
            )

    return AgainFunction


def gradients_of(formula: Formula, args: Sequence[Any], grads: Sequence[Tensor | None]) -> list:
    """The gradients of formula(*args), differentiable themselves.

    Args:
        formula: returns tensors.
        grads: the gradients of its results; None stands for zeros.

    Returns:
        One entry per argument: a list for a list, None for what is no floating-point tensor, zeros where an argument
        does not require gradients.
    """
    flat, layout = flatten(args)
    wanted = [isinstance(x, Tensor) and x.is_floating_point() for x in flat]
    found = _pulled_back(lambda *inner: formula(*unflatten(inner, layout)), flat, wanted, grads, True)
    zeros = (torch.zeros_like(x) if want and dx is None else dx for x, want, dx in zip(flat, wanted, found))
    return list(unflatten(list(zeros), layout))


def _pulled_back(
    function: Formula, flat: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None], graph: bool
) -> list[Tensor | None]:
    """The gradients of function(*flat) for the wanted items of `flat`; None for the others and where there is none."""
    with torch.enable_grad():
        # Aliases cut the graph between arguments: one may have been computed from another.
        inner = [x.view_as(x) if want else x for x, want in zip(flat, wanted)]
        ends = flatten(function(*inner))[0]
        pairs = [(end, grad) for end, grad in zip(ends, grads, strict=True) if grad is not None and end.requires_grad]
        places = [i for i, want in enumerate(wanted) if want and inner[i].requires_grad]
        found: list[Tensor | None] = [None] * len(inner)
        if pairs and places:
            outputs, cotangents = zip(*pairs)
            leaves = [inner[i] for i in places]
            made = torch.autograd.grad(outputs, leaves, cotangents, create_graph=graph, allow_unused=True)
            for i, dx in zip(places, made):
                found[i] = dx
    return found
