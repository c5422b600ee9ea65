"""What a user does with a model, and whether it gives the numbers it gave before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import openmythos
from openmythos_kernels import accelerate
from tests.kit.tiny import SMALL, enliven, tokens
from tests.kit.upstream import load_upstream

PACKAGES = ("openmythos", "open_mythos")
IDS = tokens(2, 9)
# float32 rounding, with a model as small as these. Gradients add up over loops and positions.
TOLERANCE, GRADIENTS = 1e-5, 1e-4


def make(package: str = "open_mythos", **fields) -> nn.Module:
    """A model of the package in eval mode, with weights that all matter and positions that halt at different loops."""
    source = openmythos if package == "openmythos" else load_upstream()
    return make_from(source, **fields)


def make_from(source, **fields) -> nn.Module:
    """The same, of whatever has a MythosConfig and an OpenMythos."""
    return enliven(source.OpenMythos(source.MythosConfig(**{**SMALL, **fields}))).eval()


def training(model: nn.Module) -> dict[str, Tensor]:
    """Logits and gradients; a parameter without a gradient counts as zeros, as what runs an idle expert gives it
    zeros."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(IDS)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    if loss.requires_grad:
        loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach().clone(), **found}


@torch.no_grad()
def prompt(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"logits": model(IDS).clone()}


@torch.no_grad()
def decode(model: nn.Module) -> dict[str, Tensor]:
    """A prompt of five tokens, then token by token, from a plain dict."""
    torch.manual_seed(1)
    cache: dict = {}
    steps = [model(IDS[:, :5], kv_cache=cache)]
    steps += [model(IDS[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(5, 9)]
    return {f"step {i}": step.clone() for i, step in enumerate(steps)}


WORKS = (training, prompt, decode)


def results(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {work.__name__: work(model) for work in WORKS}


def assert_same(found: dict[str, dict[str, Tensor]], before: dict[str, dict[str, Tensor]]) -> None:
    """A gradient that all but cancels is measured against a hundredth of the largest one of its run."""
    wrong = {}
    for work, expected in before.items():
        assert found[work].keys() == expected.keys(), work
        largest = max(float(t.norm()) for name, t in expected.items() if "." in name) if work == "training" else 0.0
        for name, one in expected.items():
            gradient = "." in name  # a parameter's name
            distance = float((found[work][name].double() - one.double()).norm())
            distance /= max(float(one.double().norm()), 1e-2 * largest if gradient else 0.0, 1e-300)
            if not distance <= (GRADIENTS if gradient else TOLERANCE):
                wrong[f"{work}: {name}"] = distance
    worst = sorted(wrong, key=wrong.get, reverse=True)[:4]
    assert not wrong, f"{len(wrong)} differ, most: " + ", ".join(f"{name} by {wrong[name]:.2g}" for name in worst)


def same_after(build: Callable[[], nn.Module], change: Callable[[nn.Module], object], order: str) -> nn.Module:
    """Makes the change before or after `accelerate`; the numbers must be those of the changed model without it.

    Returns:
        The accelerated model.
    """
    plain = build()
    change(plain)
    try:
        before = results(plain)
    except Exception as error:
        pytest.skip(f"the model as it is cannot take this: {type(error).__name__}: {error}")
    fast = build()
    if order == "before":
        change(fast)
        accelerate(fast)
    else:
        accelerate(fast)
        change(fast)
    assert_same(results(fast), before)
    return fast
