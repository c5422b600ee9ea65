"""PonderNet's objective, against its formula written out position by position in float64."""

import math

import pytest
import torch

from openmythos.training import LossConfig, losses
from openmythos.training.prior import geometric_prior, halting_distribution, prior_divergence
from openmythos_kernels import accelerate
from tests.kit.tiny import tiny_model, tokens

MEAN, WEIGHT, Z = 3.0, 0.3, 0.01
KINDS = {"mythos": {}, "parcae": {"injection": "parcae", "lora_rank": 0}, "gqa": {"attn_type": "gqa"}}


def by_hand(model, inputs, targets, counts):
    """Loss, cross-entropy, divergence and depth: sequence by sequence, each loop's logits from a run of its own."""

    def never(t, before, after):
        states.append(after)
        return torch.zeros(after.shape[:-1], dtype=torch.bool)

    entropy = z = kl = depth = 0.0
    for b, n in enumerate(counts):
        rest = 1 - (1 - 1 / MEAN) ** n
        left = torch.ones(inputs.shape[1], dtype=torch.float64)
        for t in range(n):
            states = []
            log = model(inputs[b : b + 1], n_loops=t + 1, exit=never)[0]
            halt = model.recurrent.act.halt
            p = torch.sigmoid((states[-1][0] @ halt.weight.T + halt.bias)[:, 0]) if t < n - 1 else torch.ones_like(left)
            here, left = left * p, left * (1 - p)
            normal = log.exp().sum(-1).log()
            entropy = entropy + (here * (normal - log[torch.arange(len(here)), targets[b]])).sum()
            z = z + (here * normal.square()).sum()
            prior = (1 / MEAN) * (1 - 1 / MEAN) ** t / rest
            kl = kl + (here * (here / prior).log()).sum()
            depth = depth + (here * (t + 1)).sum()
    size = targets.numel()
    return (entropy + WEIGHT * kl + Z * z) / size, entropy / size, kl / size, depth / size


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("n_loops", [4, [4, 1, 3]])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(kind, chunk, n_loops, fast):
    inputs, targets = tokens(3, 5), tokens(3, 5, seed=1)
    plain = tiny_model(halting="off", **KINDS[kind]).double()
    counts = [n_loops] * 3 if isinstance(n_loops, int) else n_loops
    expected, entropy, kl, depth = by_hand(plain, inputs, targets, counts)
    wanted = gradients(plain, expected)
    model = tiny_model(halting="off", **KINDS[kind]).double()
    model = accelerate(model) if fast else model
    config = LossConfig(chunk=chunk, z_weight=Z, prior_weight=WEIGHT, prior_mean=MEAN)
    total, parts = losses(model, inputs, targets, config, n_loops=n_loops)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    for name, value in {"loss": entropy, "prior": kl, "expected_depth": depth}.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-12, atol=1e-12, msg=name)
    found = gradients(model, total)
    assert wanted["recurrent.act.halt.weight"].any() and found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", [{"grad_loops": 1}, {"checkpoint_loops": True}, {"checkpoint_layers": True}])
@pytest.mark.parametrize("n_loops", [4, [4, 1, 3]])
def test_accelerated_modules_train_alike(n_loops, options):
    inputs, targets, found = tokens(3, 5), tokens(3, 5, seed=1), []
    for fast in (False, True):
        model = tiny_model(halting="off").double().train()
        model = accelerate(model) if fast else model
        total, _ = losses(model, inputs, targets, LossConfig(prior_weight=WEIGHT), n_loops=n_loops, **options)
        found.append({"loss": total.detach(), **gradients(model, total)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_a_chunk_of_logits_is_in_memory():
    model, sizes = tiny_model(halting="off", vocab_size=4096), []

    def pack(x):
        sizes.append(x.numel() if x.shape[-1:] == (4096,) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses(model, tokens(2, 12), tokens(2, 12), LossConfig(chunk=8, prior_weight=1.0))
    assert max(sizes) <= 8 * 4096


def test_the_distribution_and_its_prior():
    loops, halting = torch.tensor([3, 1]), torch.full((3, 2, 4), 0.25, dtype=torch.float64)
    p = halting_distribution(halting, loops)
    torch.testing.assert_close(p[:, 0, 0], torch.tensor([0.25, 0.1875, 0.5625], dtype=torch.float64))
    assert p[:, 1, 0].tolist() == [1, 0, 0]
    prior = geometric_prior(4.0, 3, loops).exp()
    torch.testing.assert_close(prior[:, 0], torch.tensor([16.0, 12.0, 9.0], dtype=torch.float64) / 37)
    assert prior[0, 1] == 1
    # A gate that halts with the prior's odds in each loop has no divergence.
    odds = torch.tensor([16 / 37, 12 / 21, 0.5], dtype=torch.float64).view(3, 1, 1).expand(3, 2, 4)
    assert abs(prior_divergence(halting_distribution(odds, loops), 4.0, loops)) < 1e-15


def test_a_certain_gate_has_finite_gradients():
    halting = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1).requires_grad_()
    loops = torch.tensor([3])
    found = prior_divergence(halting_distribution(halting, loops), 2.0, loops)
    found.backward()
    assert math.isclose(found.item(), math.log(7 / 2), rel_tol=1e-6) and halting.grad.isfinite().all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prior_weight": -1.0}, "loss.prior_weight = -1.0: must be >= 0"),
        ({"prior_mean": 1.0}, "loss.prior_mean = 1.0: must be > 1"),
        ({"prior_weight": 1.0, "ponder_weight": 1.0}, "loss.ponder_weight = 1.0: must be 0 with loss.prior_weight"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_models_that_it_does_not_fit(build):
    with pytest.raises(ValueError, match=r'model.halting = "freeze": must be "off" with loss.prior_weight'):
        LossConfig(prior_weight=0.1).check_model(build(halting="freeze").cfg)
    with pytest.raises(ValueError, match=r"loss.prior_weight = 0.1: must be 0 for a dense model"):
        LossConfig(prior_weight=0.1).check_model(build(n_layers=1).cfg)
