"""Norms outside of blocks: the model's last, and that of what the loops are given."""

import copy

import pytest
import torch

import openmythos
from openmythos.layers import RMSNorm
from openmythos_kernels import accelerate
from openmythos_kernels.nn import norms
from tests.kit.compare import assert_same
from tests.kit.tiny import enliven, tiny_config, tokens


@pytest.fixture
def computed(monkeypatch):
    """The weights of the norms that the op computed."""
    found = []

    def watched(x, weight, eps):
        found.append(weight)
        return op(x, weight, eps)

    op = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", watched)
    return found


def parcae():
    return enliven(openmythos.OpenMythos(tiny_config(injection="parcae", halting="off")))


def gradients(model, ids):
    model.zero_grad()
    model(ids).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_models_norms_are_computed_by_the_op(computed):
    model, ids = parcae().double(), tokens(2, 7)
    fast = accelerate(copy.deepcopy(model))
    assert_same(gradients(fast, ids), gradients(model, ids), 1e-10)
    assert [w is fast.recurrent.norm.weight or w is fast.norm.weight for w in computed] == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, y: 2 * y),
        lambda norm: setattr(norm, "forward", lambda x: 3 * x),
    ],
    ids=["hook", "forward"],
)
def test_a_norm_that_is_not_plain_is_called(change, computed):
    model, ids = parcae().double(), tokens(2, 7)
    fast = accelerate(copy.deepcopy(model))
    for changed in (model, fast):
        change(changed.norm)
        change(changed.recurrent.norm)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids), rtol=1e-10, atol=1e-10)
    assert not computed


@pytest.mark.parametrize("x", [torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.float64)])
def test_another_dtype_than_the_weights_is_left_to_the_norm(x, computed):
    norm = RMSNorm(8)
    assert torch.equal(norms.normed(norm, x), norm(x)) and not computed
