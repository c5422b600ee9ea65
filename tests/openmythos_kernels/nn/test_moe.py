"""The drop-in MoEFFN against the reference layer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import openmythos
import openmythos.moe
from openmythos_kernels import accelerate, restore
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.ops.moe import moe_experts, moe_route
from openmythos_kernels.runtime import extension
from openmythos_kernels.runtime.backends import Choice
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from openmythos_kernels.verify.saved import saved_bytes
from tests.kit.compare import swapped
from tests.kit.moe import lists
from tests.kit.ranks import run_ranks
from tests.kit.tiny import SMALL, enliven, tiny_config, tokens

pytestmark = pytest.mark.usefixtures("needs_extension")


def modules(dtype=torch.float32, seed=0, N=12):
    """(reference, its fast copy, x)."""
    torch.manual_seed(seed)
    config = SimpleNamespace(dim=24, n_experts=6, n_shared_experts=2, n_experts_per_tok=2, expert_dim=16)
    reference = openmythos.moe.MoEFFN(config).to(dtype)
    nn.init.normal_(reference.router_bias)
    return reference, swapped(reference, MoEFFN), torch.randn(2, N // 2, 24, dtype=dtype)


def run(module, x, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        y = module(x)
    y.float().sin().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{"d" + n: p.grad for n, p in module.named_parameters()}}


@pytest.mark.parametrize("N", [2, 60])
def test_module_equals_reference(N):
    draws = []
    for seed in range(4):
        reference, fast, x = modules(N=N, seed=seed)
        assert fast.backend(x) == Choice("cpu")
        draws.append((run(fast, x), run(reference, x), run(copy.deepcopy(reference).double(), x.double())))
    assert_within_budget(*(pooled(results) for results in zip(*draws)))
    assert torch.equal(fast.expert_load, reference.expert_load)
    assert list(fast.state_dict()) == list(reference.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_module_under_autocast(dtype):
    reference, fast, x = modules(N=60)
    assert fast.backend(x) == Choice("cpu")
    exact = run(copy.deepcopy(reference).double(), x.double())
    mine, theirs = run(fast, x, dtype=dtype), run(reference, x, dtype=dtype)
    assert all(mine[name].dtype == t.dtype for name, t in theirs.items() if t is not None)
    assert_within_budget(mine, theirs, exact, dtype=dtype)


def test_module_reads_weights_at_every_call():
    reference, fast, x = modules()
    with torch.no_grad():
        fast(x)
        for module in (reference, fast):
            module.routed_experts[1].up.weight.mul_(2)
            module.shared_experts[0].down.weight = nn.Parameter(torch.ones_like(module.shared_experts[0].down.weight))
            module.routed_experts[0] = copy.deepcopy(module.routed_experts[2])
        torch.testing.assert_close(fast(x), reference(x))
        other, _, _ = modules(seed=1)
        fast.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(fast(x), other(x))


@pytest.mark.parametrize("part", ["expert", "linear"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_experts_still_run(hook, part):
    _, fast, x = modules(N=200)
    fast.router_bias.zero_()  # every expert gets tokens
    seen = []
    expert = fast.routed_experts[3] if part == "expert" else fast.shared_experts[1].up
    handle = getattr(expert, hook)(lambda *args: seen.append(1))
    choice = fast.backend(x)
    assert choice.backend == "reference" and "hooks" in choice.reason
    run(fast, x)
    assert seen
    handle.remove()
    assert fast.backend(x) == Choice("cpu")


def test_module_falls_back_with_a_reason(monkeypatch):
    def reason(change, x=None):
        _, fast, given = modules()
        change(fast)
        choice = fast.backend(given if x is None else x)
        assert choice.backend == "reference"
        return choice.reason

    class Adapter(nn.Linear):
        pass

    assert "not a plain Linear" in reason(
        lambda m: m.routed_experts[0].__setattr__("gate", Adapter(24, 16, bias=False))
    )
    assert "bias" in reason(lambda m: m.routed_experts[0].__setattr__("gate", nn.Linear(24, 16)))
    assert "not a plain Expert" in reason(lambda m: m.shared_experts.__setitem__(0, nn.Identity()))
    assert "bfloat16" in reason(lambda m: None, torch.zeros(1, 1, 24, dtype=torch.bfloat16))
    assert "meta" in reason(lambda m: m.to("meta"))
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "not built")
    assert reason(lambda m: None) == "not built"
    reference, fast, x = modules()
    assert torch.equal(fast(x), reference(x))


def test_few_tokens_touch_only_the_experts_they_use():
    """The result has the same bits as with all experts, and hooks run whenever the reference would run them."""
    reference, fast, _ = modules()
    fast.eval()
    x = torch.randn(1, 2, 24)  # 4 pairs (token, slot), fewer than the 6 experts
    with torch.no_grad():
        idx, topk_weights, _ = moe_route(fast.router(x[0]), fast.router_bias, fast.topk)
        assert torch.equal(fast(x)[0], moe_experts(x[0], idx, topk_weights, *lists(fast)))
        assert fast(x[:, :0]).shape == (1, 0, 24)
        seen = []
        fast.routed_experts[int(idx[0, 0])].register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(fast(x), reference(x))
        assert seen
        unused = (set(range(6)) - set(idx.flatten().tolist())).pop()
        fast.routed_experts[unused].register_forward_hook(lambda *args: pytest.fail("not used"))
        fast(x)


def test_module_compiles_in_one_graph():
    _, fast, x = modules()
    fast.eval()
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), fast(x))


@pytest.mark.parametrize("N", [40, 400])
def test_only_x_the_pre_activations_and_the_routing_are_saved_for_backward(N):
    _, fast, x = modules(N=N)
    x.requires_grad_()
    # (2, N * K, I) and (2, S, N, K * I) before the activation; topk_weights; expert indices
    needed = 4 * (x.numel() + 2 * N * 2 * 16 + 2 * 2 * N * 32 + 2 * N) + 8 * 2 * N
    assert saved_bytes(lambda: fast(x), fast.parameters()) == needed


@pytest.mark.parametrize("N", [12, 200])
def test_recomputation_replays_the_routing_of_all_loops(N, monkeypatch):
    _, fast, x = modules(N=N)
    calls = []

    def loops(recompute):
        h = x.clone().requires_grad_()
        start, total = h, h
        for _ in range(8):
            total = total + (checkpoint(fast, total, use_reentrant=False) if recompute else fast(total))
        fast.zero_grad()
        total.sin().sum().backward()
        return {"dx": start.grad, **{name: p.grad for name, p in fast.named_parameters()}}

    expected = loops(False)
    monkeypatch.setattr(type(fast), "record_load", lambda self, expert_idx, load: calls.append(expert_idx))
    found = loops(True)
    assert len(calls) == 16
    assert all(torch.equal(first, again) for first, again in zip(calls[:8], reversed(calls[8:])))
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.fixture
def model(upstream):
    """An open-mythos model with experts that no token chooses."""
    made = enliven(upstream.OpenMythos(upstream.MythosConfig(**{**SMALL, "n_experts": 9})))
    made.recurrent.block.ffn.router_bias[3:8] = -1e4
    return made


def gradients(model):
    model.zero_grad(set_to_none=True)
    model(tokens(2, 9)).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("moe", [True, False], ids=["kernel", "reference"])
def test_idle_experts_none_gives_upstreams_gradients(model, moe):
    expected = gradients(model)
    idle = {name for name, grad in expected.items() if grad is None}
    assert len(idle) == 5 * 3
    found = gradients(accelerate(copy.deepcopy(model), moe=moe, idle_experts="none"))
    assert {name for name, grad in found.items() if grad is None} == idle
    for name in found.keys() - idle:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max())
        )


def test_idle_experts_defaults_to_zeros_and_can_be_changed(model):
    fast = accelerate(copy.deepcopy(model), idle_experts="none")
    assert all(grad is not None for grad in gradients(accelerate(fast)).values())
    accelerate(fast, idle_experts="none")
    assert "idle_experts" not in vars(restore(fast).recurrent.block.ffn)


def test_training_with_idle_experts_none_equals_upstreams(model):
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


def test_unknown_idle_experts_raises(model):
    with pytest.raises(ValueError, match="idle_experts = 'zero': must be one of zeros, none"):
        accelerate(model, idle_experts="zero")


def _train(rank: int):
    """Calls the layer twice in a row, as a loop does; the ranks route their tokens to different experts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = enliven(openmythos.MoEFFN(tiny_config())).double()
    alone, layer = layer, swapped(layer, MoEFFN)
    backend = layer.backend().backend
    x = torch.randn(2, 1, 5, 24).double()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer(layer(x[rank])).sin().sum().backward()
    (sum(alone(alone(y)).sin().sum() for y in x) / 2).backward()
    pairs = zip(layer.parameters(), alone.parameters())
    return backend, max(float((p.grad.full_tensor() - q.grad).abs().max()) for p, q in pairs)


def test_sharded_layer_equals_a_whole_one():
    for backend, worst in run_ranks(_train):
        assert backend == "cpu" and worst < 1e-12
