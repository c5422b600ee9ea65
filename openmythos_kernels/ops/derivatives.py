"""Derivatives that kernels do not have: those of gradients, forward-mode ones, and those under other transforms.

A kernel computes values and first derivatives. Whatever else is asked for comes from an op's formula: the same results
by PyTorch's own operators and the functions of `openmythos`, which PyTorch can differentiate as often and in whichever
way it likes.
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
    """formula(*args) in the dtypes of the arguments, as kernels compute: without autocast."""
    device = next(x.device.type for x in flatten(args)[0] if isinstance(x, Tensor))
    with _without_autocast(device):
        return formula(*args)


def uncast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward(ctx, *grads)` that computes in its tensors' dtypes, also where autocast is on when it runs."""

    @wraps(backward)
    def alike(ctx, *grads):
        device = next((grad.device.type for grad in grads if grad is not None), "cpu")
        with _without_autocast(device):
            return backward(ctx, *grads)

    return alike


def _without_autocast(device: str):
    """A context; one that costs nothing where autocast is off, or is not known as on meta tensors."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def saves(tensors: Sequence[Any]) -> bool:
    """Whether an op with these arguments is to keep what its backward needs. A trace may be trained wherever it was
    made."""
    return (torch.is_grad_enabled() or tracing_with_jit()) and any_requires_grad(tensors)


class Again:
    """A function by kernels, with derivatives of every order and kind.

    Args:
        kernel: `(*args) -> tuple` of tensors and lists of tensors; args are these, numbers and None.
        formula: the same by differentiable operators. Evaluated where derivatives of the results are asked for.
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
    """Of a call's arguments and, once it has run, of its results; an object, as `torch.func` takes lists apart."""

    def __init__(self, arguments: Layout):
        self.arguments, self.results = arguments, ()


def _function(kernel: Formula, formula: Formula) -> type:
    """As an autograd.Function, called with the arguments' `_Layouts`."""

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
    """Gradients of formula(*args), whose results are tensors, for `grads` of these (None: zero), with a graph behind
    them.

    Returns:
        one for each argument: None for what is no floating-point tensor, a list for a list; zeros where an argument
            does not
        require gradients.
    """
    flat, layout = flatten(args)
    wanted = [isinstance(x, Tensor) and x.is_floating_point() for x in flat]
    found = _pulled_back(lambda *inner: formula(*unflatten(inner, layout)), flat, wanted, grads, True)
    zeros = (torch.zeros_like(x) if want and dx is None else dx for x, want, dx in zip(flat, wanted, found))
    return list(unflatten(list(zeros), layout))


def _pulled_back(
    function: Formula, flat: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None], graph: bool
) -> list[Tensor | None]:
    """Gradients of function(*flat) for those of `flat` that are wanted; None for the others and where there is none."""
    with torch.enable_grad():
        # Aliases: one argument may have been computed from another, and its gradient must not contain that one's.
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
