"""What a swapped model keeps: no data read on the host, one graph, checkpointing and autocast as in the reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import openmythos_kernels
from openmythos import KVCache, OpenMythos
from openmythos_kernels.runtime import extension
from openmythos_kernels.verify.budget import assert_within_budget
from tests.kit.thresholds import set_threshold
from tests.kit.tiny import tiny_config, tiny_model, tokens

IDS = tokens(2, 9)


@pytest.fixture(autouse=True)
def attention_is_made_again(monkeypatch):
    """As in large calls, however little these would keep."""
    set_threshold(monkeypatch, "mla_recompute", 0)


@pytest.fixture(autouse=True, scope="module")
def needs_extension():
    assert extension.module is not None, extension.reason


def swapped(**fields):
    model = openmythos_kernels.accelerate(tiny_model(**fields))
    assert all(row.backend == "cpu" for row in openmythos_kernels.report(model))
    return model


def loss_of(model, ids=IDS, **options):
    return F.cross_entropy(model(ids, **options).float().flatten(0, 1), ids.flatten())


def gradients(model, loss) -> dict:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


@pytest.mark.parametrize("way", ["training", "inference", "decoding"])
def test_forward_reads_no_data_on_the_host(way):
    """Fake tensors have none: `.item()`, `.tolist()` or a shape that depends on data would raise. So the whole forward
    can also be captured as a CUDA graph.

    As many experts as chosen ones: fewer tokens look at their choice on the host, where that is the CPU.
    """
    with FakeTensorMode():
        model = openmythos_kernels.accelerate(OpenMythos(tiny_config(n_experts=4)))
        ids = torch.zeros(2, 9, dtype=torch.int64)
        if way == "training":
            loss_of(model.train(), ids, n_loops=3).backward()
            assert all(p.grad is not None for p in model.parameters())
            return
        with torch.no_grad():
            if way == "inference":
                assert model(ids, n_loops=3).shape == (2, 9, 37)
                return
            cache = KVCache()
            model(ids[:, :8], n_loops=3, kv_cache=cache)
            assert model(ids[:, 8:], n_loops=3, kv_cache=cache, start_pos=8).shape == (2, 1, 37)


def test_compiled_whole_equals_eager():
    model = swapped(prelude_layers=0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, n_loops=2), fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(IDS), model(IDS, n_loops=2), rtol=1e-5, atol=1e-5)
    expected = gradients(model, loss_of(model, n_loops=2))
    found = gradients(model, F.cross_entropy(compiled(IDS).flatten(0, 1), IDS.flatten()))
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", ["loops", "blocks"])
def test_activation_checkpointing_equals_without(way):
    model = swapped()
    expected = gradients(model, loss_of(model))
    if way == "loops":
        found = gradients(model, loss_of(model, checkpoint_loops=True))
    else:
        for block in (*model.prelude, model.recurrent.block, *model.coda):
            forward = block.forward
            block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        found = gradients(model, loss_of(model))
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_autocast_stays_within_the_budget():
    """bfloat16 arithmetic on float32 weights. No rounding decides anything here: all experts are chosen, and every
    position halts in the second loop. All gradients, each in units of its size, are one quantity, over four batches."""
    model = tiny_model(n_experts=3, n_experts_per_tok=3, halt=0.0)
    model.recurrent.act.halt.bias.data.fill_(0.3)
    fast = openmythos_kernels.accelerate(copy.deepcopy(model))
    wide = copy.deepcopy(model).double()
    draws = []
    for seed in range(4):
        ids, found = tokens(2, 9, seed=seed), []
        for each, low in ((fast, True), (model, True), (wide, False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = loss_of(each, ids)
            found.append((loss.detach().reshape(1), gradients(each, loss)))
        sizes = {name: grad.norm() for name, grad in found[-1][1].items() if grad is not None and grad.norm() > 0}
        draws.append(
            [
                {"loss": loss, "gradients": torch.cat([(grads[name] / size).flatten() for name, size in sizes.items()])}
                for loss, grads in found
            ]
        )
    assert len(sizes) > 50
    results = [{name: torch.cat([draw[i][name] for draw in draws]) for name in draws[0][0]} for i in range(3)]
    results[:2] = [{name: x.float() for name, x in result.items()} for result in results[:2]]
    assert_within_budget(*results, dtype=torch.bfloat16)
