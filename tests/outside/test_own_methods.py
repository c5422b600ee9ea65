"""A method replaced on a module or on a class is the one that runs."""

from __future__ import annotations

import pytest
import torch

import openmythos
from openmythos_kernels import accelerate, report
from tests.outside.works import IDS, PACKAGES, assert_same, make, results, same_after

pytestmark = pytest.mark.filterwarnings("ignore")


def scaled(out):
    """Multiplies every floating-point tensor that a method returns by 1.25."""
    if torch.is_tensor(out):
        return out * 1.25 if out.is_floating_point() else out
    return type(out)(scaled(one) for one in out) if type(out) in (tuple, list) else out


def with_scaled(method):
    return lambda *args, **kwargs: scaled(method(*args, **kwargs))


# Methods of the reference, and those that open-mythos has as well.
SHARED = ["recurrent.injection.get_A"]
OURS = [
    *SHARED,
    "recurrent.injection.update",
    "recurrent.injection.enter",
    "recurrent.injection.prepare",
    "recurrent.injection.readout",
    "recurrent.block.ffn.route",
    "prelude.0.attn.expand",
    "recurrent.block.attn.expand",
    "prelude.0.attn.query",
    "prelude.0.attn.latent",
    "prelude.0.attn.attend",
    "recurrent.lora.hidden",
    "recurrent.enter",
    "recurrent.initial_state",
    "coda.0.attn.expand",
]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("package, path", [("openmythos", p) for p in OURS] + [("open_mythos", p) for p in SHARED])
def test_a_method_of_an_instance(package, path, order):
    def change(model):
        part, _, name = path.rpartition(".")
        part = model.get_submodule(part)
        setattr(part, name, with_scaled(getattr(part, name)))

    assert str(report(same_after(lambda: make(package), change, order)))


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_recurrent_step_of_an_instance(order):
    def change(model):
        inner = model.recurrent.step

        def step(h, e, u, block_out, *rest, **named):
            return inner(h, e, u, block_out * 1.25, *rest, **named)

        model.recurrent.step = step

    same_after(lambda: make("openmythos"), change, order)


CLASSES = [
    ("openmythos", "MLAttention", "expand"),
    ("openmythos", "MLAttention", "forward"),
    ("openmythos", "MoEFFN", "route"),
    ("openmythos", "LoRAAdapter", "hidden"),
    ("openmythos", "LoRAAdapter", "forward"),
    ("openmythos", "RMSNorm", "forward"),
    ("openmythos", "Expert", "forward"),
    ("openmythos", "ACTHalting", "forward"),
    ("openmythos", "TransformerBlock", "forward"),
    ("openmythos", "RecurrentBlock", "forward"),
    ("openmythos", "RecurrentBlock", "enter"),
    *(
        ("open_mythos", name, "forward")
        for name in (
            "MLAttention",
            "MoEFFN",
            "LoRAAdapter",
            "RMSNorm",
            "Expert",
            "ACTHalting",
            "TransformerBlock",
            "RecurrentBlock",
            "LTIInjection",
        )
    ),
    ("open_mythos", "LTIInjection", "get_A"),
]


@pytest.mark.parametrize("package, cls, name", CLASSES)
def test_a_method_of_a_class(upstream, monkeypatch, package, cls, name):
    cls = getattr(openmythos if package == "openmythos" else upstream, cls)
    monkeypatch.setattr(cls, name, with_scaled(cls.__dict__[name]))
    before = results(make(package))
    fast = accelerate(make(package))
    assert_same(results(fast), before)
    assert str(report(fast))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("package", PACKAGES)
def test_monte_carlo_dropout(package, order):
    """With dropout modules in training mode inside a model in eval mode, two calls differ, and a seed gives the same
    result as before the swap."""

    def change(model):
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.train()

    fast = same_after(lambda: make(package, dropout=0.3), change, order)
    with torch.no_grad():
        assert not torch.equal(fast(IDS), fast(IDS))


@pytest.mark.parametrize("package", PACKAGES)
def test_dropout_of_training_draws_as_before(package):
    same_after(lambda: make(package, dropout=0.3).train(), lambda model: None, "before")
