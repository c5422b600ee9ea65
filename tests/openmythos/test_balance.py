"""The balance loss: its formula, sequence by sequence, for the reference and for accelerated modules on every path."""

import pytest
import torch

from openmythos.balance import recording_scores
from openmythos.moe import MoEFFN
from openmythos.training import LossConfig, losses
from openmythos_kernels import accelerate
from tests.kit.tiny import tiny_model, tokens

KINDS = {
    "ACT": {"act_threshold": 0.6},
    "freeze": {"halting": "freeze", "act_threshold": 0.6},
    "off": {"halting": "off"},
    "stack": {"core_layers": 2, "injection": "concat", "lora_rank": 0},
}


def build(kind, fast=False):
    model = tiny_model(**KINDS[kind]).double().train()
    return accelerate(model) if fast else model


def by_hand(model, ids, counts):
    """The loss, from the router's inputs in runs of single sequences, each through all of its loops."""
    layers = [m for m in model.modules() if isinstance(m, MoEFFN)]
    total = 0.0
    model.recurrent.in_step = lambda predict: True  # it stops for nobody
    for b, n in enumerate(counts):
        seen = {layer: [] for layer in layers}
        hooks = [
            layer.router.register_forward_pre_hook(lambda _, args, to=seen[layer]: to.append(args[0]))
            for layer in layers
        ]
        model(ids[b : b + 1], n_loops=n)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            x = torch.cat(seen[layer])
            assert len(x) == n * ids.shape[1]
            logits = x @ layer.router.weight.T
            chosen = (logits + layer.router_bias).topk(layer.topk, -1).indices
            for e in range(layer.n_experts):
                f = layer.n_experts * (chosen == e).double().sum() / (layer.topk * len(x))
                total = total + f * (logits.exp() / logits.exp().sum(-1, keepdim=True))[:, e].mean()
    del model.recurrent.in_step
    return total / len(counts) / len(layers)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("n_loops", [4, [4, 1, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(kind, n_loops, fast):
    ids = tokens(3, 5)
    plain, model = build(kind), build(kind, fast)
    expected = by_hand(plain, ids, [n_loops] * 3 if isinstance(n_loops, int) else n_loops)
    wanted = gradients(plain, expected)
    with recording_scores(model, len(ids)) as scores:
        model(ids, n_loops=n_loops)
    found = scores.balance()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    on = gradients(model, found)
    assert "recurrent.block.ffn.router.weight" in on or kind == "stack"
    assert on.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(on[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert all(m.scores is None for m in model.modules() if isinstance(m, MoEFFN)) and model.recurrent.scores is None


@pytest.mark.parametrize("options", [{}, {"grad_loops": 1}, {"checkpoint_loops": True}])
@pytest.mark.parametrize("n_loops", [4, [4, 1, 3]])
@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_accelerated_modules_train_alike(prior, n_loops, options):
    ids, targets, found = tokens(3, 5), tokens(3, 5, seed=1), []
    kind = "off" if prior else "ACT"
    for fast in (False, True):
        model = build(kind, fast)
        config = LossConfig(balance_weight=0.5, prior_weight=prior)
        total, parts = losses(model, ids, targets, config, n_loops=n_loops, **options)
        plain, _ = losses(model, ids, targets, LossConfig(prior_weight=prior), n_loops=n_loops, **options)
        torch.testing.assert_close(total, plain + 0.5 * parts["balance"], rtol=0, atol=1e-12)
        found.append({"balance": parts["balance"], **gradients(model, total)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12, msg=name)


@torch.no_grad()
def test_without_gradients():
    ids, found = tokens(2, 5), []
    for fast in (False, True):
        model = tiny_model().eval()
        model = accelerate(model) if fast else model
        found.append(losses(model, ids, ids, LossConfig(balance_weight=1.0))[1]["balance"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_it_is_1_where_experts_are_balanced_and_pulls_toward_it():
    model = build("off")
    layer = model.recurrent.block.ffn
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    ids = tokens(2, 6)
    with recording_scores(model, 2) as scores:
        model(ids)
    loss = scores.balance()
    torch.testing.assert_close(loss, torch.ones_like(loss), rtol=0, atol=1e-12)  # even scores, whatever the load
    with torch.no_grad():
        layer.router.weight.normal_(std=3.0)
        layer.router_bias.zero_()
    with recording_scores(model, 2) as scores:
        model(ids)
    before = scores.balance()
    before.backward()
    with torch.no_grad():
        layer.router.weight -= 0.01 * layer.router.weight.grad
    with recording_scores(model, 2) as scores:
        model(ids)
    assert 1 < scores.balance() < before


def test_models_that_it_does_not_fit():
    for fields in ({"core_ffn": "dense"},):
        with pytest.raises(ValueError, match=r"loss.balance_weight = 0.1: must be 0 for a model without experts"):
            LossConfig(balance_weight=0.1).check_model(tiny_model(**fields).cfg)
    with recording_scores(tiny_model(core_ffn="dense"), 1) as scores, pytest.raises(ValueError, match="routed nothing"):
        scores.balance()
    with pytest.raises(ValueError, match=r"loss.balance_weight = -1: must be >= 0"):
        LossConfig(balance_weight=-1)
