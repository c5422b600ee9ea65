"""Fast modules beside reference modules, and comparisons of named results."""

from __future__ import annotations

import copy

import torch


def swapped(module, cls):
    """A deep copy of a module as an instance of `cls`, which has the same parameters."""
    made = copy.deepcopy(module)
    made.__class__ = cls
    return made


def zeros_if_none(x):
    return torch.zeros(()) if x is None else x


def assert_same(got, expected, tolerance=1e-12):
    """Equal names, dtypes and values. A gradient that is None on one side must be None or zeros on the other."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        y = got[name]
        if x is None or y is None:
            assert all(g is None or not g.any() for g in (x, y)), name
        else:
            assert y.dtype == x.dtype, name
            torch.testing.assert_close(
                y, x, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_same_function(fast, reference, leaves):
    """Equal results and equal gradients of every leaf, for random gradients of the results, in float64."""
    results = []
    for function in (fast, reference):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = [x for x in function(*inputs) if x.is_floating_point()]
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, inputs, [torch.randn_like(x) for x in out], allow_unused=True)
        results.append([*out, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(zeros_if_none(a), zeros_if_none(b), rtol=1e-12, atol=1e-12)
