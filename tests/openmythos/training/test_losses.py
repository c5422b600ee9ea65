import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from openmythos.training.losses import LossConfig, head_of, losses, token_losses


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randint(256, (2, 3, 16))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"n_layers": 2}])
@pytest.mark.parametrize("chunk", [0, 7, 48, 1000])
def test_chunks_change_neither_loss_nor_gradients(build, batch, fields, chunk):
    model, (inputs, targets) = build(prelude_layers=1, **fields).double(), batch
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    wanted = gradients(model, expected)
    total, parts = losses(model, inputs, targets, LossConfig(chunk=chunk))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    assert parts == {"loss": pytest.approx(expected.item(), abs=1e-12)}
    for name, found in gradients(model, total).items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_chunks_keep_the_logits_of_one_chunk_in_memory():
    vocabulary, head, sizes = 512, nn.Linear(8, 512, bias=False), []
    hidden = torch.randn(4, 64, 8, requires_grad=True)

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_losses(hidden, head, torch.zeros(4, 64, dtype=torch.int64), chunk=32)
    assert max(sizes) <= max(hidden.numel(), head.weight.numel()) < 4 * 64 * vocabulary


@pytest.mark.parametrize("chunk", [0, 5])
def test_the_z_loss_is_the_mean_squared_logsumexp(build, batch, chunk):
    model, (inputs, targets) = build().double(), batch
    total, parts = losses(model, inputs, targets, LossConfig(chunk=chunk, z_weight=0.5))
    logits = model(inputs)
    z = logits.logsumexp(-1).square().mean()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + 0.5 * z
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    assert parts["z"] == pytest.approx(z.item(), abs=1e-12)


@pytest.mark.parametrize("step, share", [(0, 0.25), (3, 1.0), (99, 1.0)])
def test_the_ponder_cost_warms_up(build, batch, step, share):
    model, (inputs, targets) = build().double(), batch
    plain = losses(model, inputs, targets, LossConfig())[0]
    total, parts = losses(model, inputs, targets, LossConfig(ponder_weight=0.1, ponder_warmup=3), step)
    ponder = model(inputs, return_ponder=True)[1].mean()
    torch.testing.assert_close(total, plain + share * 0.1 * ponder, rtol=0, atol=1e-12)
    assert parts["ponder"] == pytest.approx(ponder.item(), abs=1e-12)


def test_the_head_is_found_inside_wrappers(build):
    model = build()
    assert head_of(SimpleNamespace(module=model, get_submodule=lambda name: model)) is model.head


def test_what_cannot_be_is_refused(build):
    for wrong in ({"chunk": -1}, {"z_weight": -1}, {"ponder_weight": math.nan}, {"ponder_warmup": 0.5}):
        with pytest.raises(ValueError, match=f"loss.{next(iter(wrong))} = "):
            LossConfig(**wrong)
    for fields in ({"halting": "off"}, {"n_layers": 1}):
        with pytest.raises(ValueError, match=r"loss.ponder_weight = 0.1: must be 0 for a model without ACT"):
            LossConfig(ponder_weight=0.1).check_model(build(**fields).cfg)
