"""What the loop driver owns: where gradients begin, autocast's cache, and what the autograd graph holds."""

import gc
import weakref

import pytest
import torch

from openmythos.attention import CausalMask
from openmythos.halting import ACTState
from openmythos.loop import Carry, LoopDriver
from openmythos_kernels import accelerate
from tests.kit.tiny import relative, tiny_model, tokens


def carry(model, batch=2, length=5) -> Carry:
    h = torch.randn(batch, length, 24)
    return Carry(h, h, None, ACTState.start(h), model.freqs_cis_mla[:length], CausalMask(0, length))


@pytest.mark.parametrize("grad_loops, starts_at", [(None, 0), (2, 3), (5, 0), (9, 0)])
def test_gradients_begin_at_their_loop(grad_loops, starts_at, monkeypatch):
    model = tiny_model(act_threshold=9.0)
    block, graded, entered = model.recurrent, [], []
    step, enter = block.step, block.enter

    def recorded_step(*args):
        graded.append(torch.is_grad_enabled())
        return step(*args)

    def recorded_enter(h, e, t):
        entered.append(t)
        return enter(h, e, t)

    monkeypatch.setattr(block, "step", recorded_step)
    monkeypatch.setattr(block, "enter", recorded_enter)
    end = LoopDriver(block, 5, grad_loops).run(carry(model))
    assert graded == [t >= starts_at for t in range(5)]
    assert sorted(entered) == sorted([*range(5), *([starts_at] if starts_at else [])])  # once more where they begin
    assert end.u is None and end.h.requires_grad


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("n_loops", [4, [4, 2]])
def test_truncated_gradients_under_autocast(fast, n_loops):
    """Autocast caches casts of weights: those made without gradients must not serve the loops with gradients."""
    grads = []
    for enabled in (False, True):
        model = tiny_model(act_threshold=9.0)
        model = accelerate(model) if fast else model
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(tokens(2, 6), n_loops=n_loops, grad_loops=1)
        logits.float().logsumexp(-1).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.recurrent.block.attn.parameters()]))
    assert grads[0].any() and relative(grads[1], grads[0]) < 0.1


@pytest.mark.parametrize("checkpoint_loops", [False, True])
def test_the_graph_does_not_hold_the_driver(checkpoint_loops):
    """A driver may hold results, and with them the graph: that cycle no collector could see."""
    model = tiny_model()
    driver = LoopDriver(model.recurrent, 4, checkpoint_loops=checkpoint_loops)
    end, alive = driver.run(carry(model)), weakref.ref(driver)
    del driver
    gc.collect()
    assert alive() is None and end.state.h_out.requires_grad
