"""What the block reads in a loop with Parcae's injection, by one op."""

import copy
from collections import Counter

import pytest
import torch

from openmythos.injection import ParcaeInjection
from openmythos_kernels import accelerate
from openmythos_kernels.nn import paths
from openmythos_kernels.nn.call import EnterCall
from openmythos_kernels.nn.paths import parcae_enter
from openmythos_kernels.nn.recurrence import RecurrentBlock
from tests.kit.compare import assert_same, swapped
from tests.kit.loop import run_block, small_block


@pytest.fixture
def ran(monkeypatch):
    found = Counter()
    monkeypatch.setattr(paths, "listener", lambda module, path: found.update([path.__name__.rpartition(".")[2]]))
    return found


def parcae_block(**fields):
    return small_block(std=0.2, **{"max_loop_iters": 3, "injection": "parcae", "halting": "off", **fields})


@pytest.mark.parametrize("halting", ["off", "evolve", "freeze"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_numbers_and_gradients_are_the_references(halting, dtype, tolerance, ran):
    block = parcae_block(halting=halting).to(dtype)
    with torch.no_grad():  # rates that differ from channel to channel, beyond both bounds too
        block.injection.A_log.copy_(torch.linspace(-25, 25, 24))
        block.injection.dt_bias.copy_(torch.linspace(-3, 3, 24))
    x = torch.randn(2, 6, 24, dtype=dtype)
    expected = run_block(copy.deepcopy(block), x, 4)
    assert not ran
    assert_same(run_block(swapped(block, RecurrentBlock), x, 4), expected, tolerance)
    assert ran["parcae_enter"] >= 3


def refusal(block, x):
    return parcae_enter.refuses(EnterCall(block, x, x, 0))


def test_what_it_refuses():
    block, x = swapped(parcae_block(), RecurrentBlock), torch.randn(1, 4, 24)
    assert not refusal(block, x)
    assert "states of torch.bfloat16" in refusal(block, x.bfloat16())
    assert "with rates of torch.float64" in refusal(swapped(parcae_block().double(), RecurrentBlock), x)
    seen: list[str] = []
    torch.func.vmap(lambda x: (seen.append(refusal(block, x)), x)[1])(x[None])
    assert seen == ["traced or transformed"]
    assert "another injection" in refusal(swapped(parcae_block(injection="concat"), RecurrentBlock), x)


def own_decay(block):
    block.injection.decay = lambda: (torch.ones(24), torch.ones(24))


def own_enter(block):
    block.injection.enter = lambda h, e, t, norm: h + e


@pytest.mark.parametrize("change", [own_decay, own_enter])
def test_methods_of_its_own_are_called(change, ran):
    block, x = parcae_block(), torch.randn(1, 4, 24)
    change(block)
    expected = run_block(copy.deepcopy(block), x, 2)
    assert_same(run_block(swapped(block, RecurrentBlock), x, 2), expected, 1e-5)
    assert not ran["parcae_enter"]


def test_a_patched_class_is_called(monkeypatch):
    block, x = parcae_block(), torch.randn(1, 4, 24)
    monkeypatch.setattr(ParcaeInjection, "decay", lambda self: (torch.ones(24), torch.ones(24)))
    fast = accelerate(copy.deepcopy(block))
    assert_same(run_block(fast, x, 2), run_block(block, x, 2), 1e-5)
    assert "ParcaeInjection" in refusal(fast, x)
    monkeypatch.undo()
    accelerate(fast)
