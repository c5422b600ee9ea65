"""What the weights of experts without a token get: gradients of zeros, or none as in open-mythos."""

import copy

import pytest
import torch

from openmythos_kernels import accelerate, restore
from tests.kit.tiny import SMALL, enliven, tokens


@pytest.fixture
def model(upstream):
    """Of open-mythos, with experts that nobody chooses."""
    made = enliven(upstream.OpenMythos(upstream.MythosConfig(**{**SMALL, "n_experts": 9})))
    made.recurrent.block.ffn.router_bias[3:8] = -1e4
    return made


def gradients(model):
    model.zero_grad(set_to_none=True)
    model(tokens(2, 9)).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("moe", [True, False], ids=["kernel", "reference"])
def test_none_is_what_upstream_does(model, moe):
    expected = gradients(model)
    idle = {name for name, grad in expected.items() if grad is None}
    assert len(idle) == 5 * 3
    found = gradients(accelerate(copy.deepcopy(model), moe=moe, idle_experts="none"))
    assert {name for name, grad in found.items() if grad is None} == idle
    for name in found.keys() - idle:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max())
        )


def test_zeros_is_the_default_and_the_choice_can_be_changed(model):
    fast = accelerate(copy.deepcopy(model), idle_experts="none")
    assert all(grad is not None for grad in gradients(accelerate(fast)).values())
    accelerate(fast, idle_experts="none")
    assert "idle_experts" not in vars(restore(fast).recurrent.block.ffn)


def test_training_is_upstreams_step_for_step(model):
    fast = accelerate(copy.deepcopy(model), idle_experts="none")
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1) for m in (model, fast)]
    before = model.recurrent.block.ffn.routed_experts[5].gate.weight.clone()
    for _ in range(5):
        losses = []
        for m, optimizer in zip((model, fast), optimizers):
            loss = torch.nn.functional.cross_entropy(m(tokens(2, 9)).flatten(0, 1), tokens(2, 9, seed=1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for m in (model, fast):
        assert torch.equal(m.recurrent.block.ffn.routed_experts[5].gate.weight, before)


def test_another_word_is_refused(model):
    with pytest.raises(ValueError, match="idle_experts = 'zero': must be one of zeros, none"):
        accelerate(model, idle_experts="zero")
