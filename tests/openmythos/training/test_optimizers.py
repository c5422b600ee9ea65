import copy

import pytest
import torch

from openmythos.training.losses import LossConfig, losses
from openmythos.training.optimizers import Average, OptimizerConfig, Together, make_optimizer, muon_matrices

MUON = OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    inputs, targets = torch.randint(256, (2, 2, 16))
    optimizer.zero_grad()
    losses(model, inputs, targets, LossConfig())[0].backward()
    optimizer.step()


def names(model, optimizer, group):
    ids = {id(p) for p in optimizer.param_groups[group]["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_muon_takes_the_matrices_between_activations(build):
    model = build(prelude_layers=1)
    optimizer = make_optimizer(model, config=MUON)
    muon, matrices, exempt = (names(model, optimizer, i) for i in range(3))
    assert "prelude.0.attn.q_down.weight" in muon and "recurrent.block.ffn.routed_experts.0.gate.weight" in muon
    assert {"recurrent.block.ffn.router.weight", "recurrent.act.halt.weight"} <= matrices
    assert {"embed.weight", "norm.weight", "recurrent.injection.log_A"} <= exempt
    assert len(muon) + len(matrices) + len(exempt) == len(dict(model.named_parameters()))
    assert [group["peak"] for group in optimizer.param_groups] == [0.02, 1e-3, 1e-3]
    assert optimizer.param_groups[2]["weight_decay"] == 0


def test_optimizers_together_do_what_each_does(build):
    one, other = build(), build()
    together = make_optimizer(one, config=MUON)
    chosen = muon_matrices(other)
    muon = torch.optim.Muon([p for p in other.parameters() if id(p) in chosen], lr=0.02, weight_decay=0.1)
    groups = make_optimizer(other, config=MUON).param_groups[1:]
    adamw = torch.optim.AdamW(
        [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=1e-3, betas=(0.9, 0.95), fused=True
    )
    for i in range(3):
        step(one, together, i)
        torch.manual_seed(i)
        inputs, targets = torch.randint(256, (2, 2, 16))
        other.zero_grad()
        losses(other, inputs, targets, LossConfig())[0].backward()
        muon.step()
        adamw.step()
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


def test_the_state_of_optimizers_together_is_saved_and_loaded(build):
    model = build()
    optimizer = make_optimizer(model, config=MUON)
    step(model, optimizer, 0)
    again = copy.deepcopy(model)
    loaded = make_optimizer(again, config=MUON)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(loaded, Together) and len(loaded.state) == len(optimizer.state) > 0
    for i in (1, 2):
        step(model, optimizer, i)
        step(again, loaded, i)
    for (name, a), b in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(a, b), name


def test_rates_set_in_the_groups_reach_the_parts(build):
    model = build()
    optimizer = make_optimizer(model, config=MUON)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_averages_follow_the_weights_and_swap(build):
    model = build()
    average = Average(model, decay=0.5)
    start = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight += 1
    average.update(100)
    torch.testing.assert_close(average.weights["embed.weight"], start + 0.5)
    average.swap()
    torch.testing.assert_close(model.embed.weight.detach(), start + 0.5)
    average.swap()
    torch.testing.assert_close(model.embed.weight.detach(), start + 1)


def test_stochastic_rounding_keeps_small_steps_on_average():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = make_optimizer(layer, config=OptimizerConfig(lr=1e-3, weight_decay=0), stochastic_rounding=True)
    for _ in range(4):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()  # by 1e-3 each, where bfloat16 has steps of 4e-3 below 1
    assert layer.weight.float().mean().item() == pytest.approx(1 - 4e-3, abs=3e-4)


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"beta1": 1.0}, {"ema": 1.5}, {"warmup": -1}, {"clip": float("nan")}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))} = "):
        OptimizerConfig(**wrong)
