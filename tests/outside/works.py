"""What users do with a model, and whether the results stay the same."""

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
# Relative tolerances for float32 rounding in small models. Gradients are sums over loops and positions.
TOLERANCE, GRADIENTS = 1e-5, 1e-4


def make(package: str = "open_mythos", **fields) -> nn.Module:
    """A model of the package in eval mode, in which every weight matters and positions halt at different loops."""
    source = openmythos if package == "openmythos" else load_upstream()
    return make_from(source, **fields)


def make_from(source, **fields) -> nn.Module:
    """As `make`, from any module with a MythosConfig and an OpenMythos."""
    return enliven(source.OpenMythos(source.MythosConfig(**{**SMALL, **fields}))).eval()


def training(model: nn.Module) -> dict[str, Tensor]:
    """Logits and gradients. A missing gradient counts as zeros, since idle experts may get zeros or none."""
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
    """Logits of a prompt of five tokens and of four decoded tokens, with a plain dict as cache."""
    torch.manual_seed(1)
    cache: dict = {}
    steps = [model(IDS[:, :5], kv_cache=cache)]
    steps += [model(IDS[:, t : t + 1], kv_cache=cache, start_pos=t) for t in range(5, 9)]
    return {f"step {i}": step.clone() for i, step in enumerate(steps)}


WORKS = (training, prompt, decode)


def results(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {work.__name__: work(model) for work in WORKS}


def assert_same(found: dict[str, dict[str, Tensor]], before: dict[str, dict[str, Tensor]]) -> None:
    """Compares results by relative norm. A gradient that almost cancels is compared with a hundredth of the largest
    gradient."""
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
    """Applies a change before or after `accelerate`; the results must be those of the changed plain model.

    Returns:
        The accelerated model.
    """
    plain = build()
    change(plain)
    try:
        before = results(plain)
    except Exception as error:
        pytest.skip(f"the plain model does not support this: {type(error).__name__}: {error}")
    fast = build()
    if order == "before":
        change(fast)
        accelerate(fast)
    else:
        accelerate(fast)
        change(fast)
    assert_same(results(fast), before)
    return fast
