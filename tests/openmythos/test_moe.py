import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

from openmythos import MoEFFN, recording_routing, update_router_bias
from openmythos_kernels import accelerate
from tests.kit.tiny import enliven, relative, tiny_config, tiny_model, tokens


def make(**fields) -> MoEFFN:
    return enliven(MoEFFN(tiny_config(**fields)))


def by_token(moe: MoEFFN, x):
    """One token at a time, with a full softmax renormalized over the chosen experts."""
    out = []
    for token in x.view(-1, x.shape[-1]):
        logits = moe.router.weight @ token
        chosen = sorted(range(len(logits)), key=lambda e: -(logits + moe.router_bias)[e])[: moe.topk]
        prob = logits.softmax(0)
        routed = sum(prob[e] / prob[chosen].sum() * moe.routed_experts[e](token) for e in chosen)
        out.append(routed + sum(expert(token) for expert in moe.shared_experts))
    return torch.stack(out).view_as(x)


def test_output_by_definition():
    one_expert = dict(n_experts=1, n_experts_per_tok=1)
    for fields in ({}, dict(n_experts_per_tok=1), dict(n_experts_per_tok=5), dict(n_shared_experts=0), one_expert):
        moe = make(**fields).double()
        x = torch.randn(2, 7, 24, dtype=torch.float64)
        assert relative(moe(x), by_token(moe, x)) < 1e-12


def test_bias_chooses_and_never_weighs():
    moe = make()
    x = torch.randn(11, 24)
    moe.router_bias.zero_()
    moe.router_bias[3] = 100.0
    expert_idx, topk_weights = moe.route(x)
    assert (expert_idx == 3).any(1).all()
    torch.testing.assert_close(topk_weights.sum(1), torch.ones(11))
    torch.testing.assert_close(topk_weights, moe.router(x).gather(1, expert_idx).softmax(1))


def test_no_token_is_dropped_when_all_choose_one_expert():
    moe = make(n_experts_per_tok=1)
    moe.router_bias[2] = 100.0
    x = torch.randn(1, 50, 24)
    expected = moe.routed_experts[2](x) + moe.shared_experts[0](x)
    torch.testing.assert_close(moe(x), expected)


def test_every_expert_has_a_gradient():
    """A zero gradient without tokens: FSDP hangs if ranks disagree about which parameters have a gradient."""
    moe = make(n_experts_per_tok=1)
    moe.router_bias[2] = 100.0
    moe(torch.randn(1, 5, 24)).sum().backward()
    for e, expert in enumerate(moe.routed_experts):
        assert all(bool(p.grad.any()) == (e == 2) for p in expert.parameters())
    assert moe.router.weight.grad is not None


def test_load_is_counted_while_training_only():
    moe = make()
    x = torch.randn(2, 7, 24)
    moe.eval()(x)
    assert moe.expert_load is None
    moe.train()(x)
    once = moe.expert_load
    assert torch.equal(once, torch.bincount(moe.route(x.view(-1, 24))[0].flatten(), minlength=5))
    moe(x)
    assert torch.equal(moe.expert_load, 2 * once) and "expert_load" not in moe.state_dict()


def test_update_follows_the_sign_and_starts_anew():
    moe = make()
    moe.router_bias.zero_()
    moe.expert_load = torch.tensor([10, 0, 4, 4, 2])  # mean 4
    update_router_bias(moe, rate=0.25)
    assert moe.router_bias.tolist() == [-0.25, 0.25, 0, 0, 0.25] and moe.expert_load is None
    update_router_bias(moe, rate=0.25)  # nothing seen since
    assert moe.router_bias.tolist() == [-0.25, 0.25, 0, 0, 0.25]


def test_balancing_evens_out_the_loads():
    moe = make(n_experts=6, n_experts_per_tok=2).train()
    moe.router_bias.zero_()
    with torch.no_grad():
        moe.router.weight[0] += 1.0  # a favorite
        x = torch.randn(1, 400, 24) + 0.3

        def imbalance():
            load = torch.bincount(moe.route(x[0])[0].flatten(), minlength=6)
            return float(load.max() / load.double().mean())

        before = imbalance()
        for _ in range(200):
            moe(x)
            update_router_bias(moe, rate=0.05)
        assert before > 2 and imbalance() < 1.2


def test_every_layer_of_a_model_is_balanced():
    model = tiny_model(core_layers=2).train()
    before = [block.ffn.router_bias.clone() for block in model.recurrent.block]
    model(tokens(2, 9))
    update_router_bias(model)
    for block, bias in zip(model.recurrent.block, before):
        assert not torch.equal(block.ffn.router_bias, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_wide(dtype):
    """In bfloat16 a step of 1e-3 rounds to none from 0.5 on."""
    model = tiny_model().train()
    ffn, keys = model.recurrent.block.ffn, list(model.state_dict())
    kept = ffn.router_bias.clone()
    model.to(dtype)
    assert (
        ffn.router_bias.dtype == torch.float32
        and torch.equal(ffn.router_bias, kept)
        and list(model.state_dict()) == keys
    )
    assert copy.deepcopy(model).half().recurrent.block.ffn.router_bias.dtype == torch.float32
    assert copy.deepcopy(model).double().recurrent.block.ffn.router_bias.dtype == torch.float64
    low = {key: value.to(dtype) if value.is_floating_point() else value for key, value in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(low, assign=assign)
        assert ffn.router_bias.dtype == torch.float32 and torch.equal(ffn.router_bias, kept.to(dtype).float())
        assert ffn.router.weight.dtype == dtype
    with torch.no_grad():
        ffn.router_bias.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5, 0.5]))
    for narrow in (False, True):
        if narrow:
            ffn._buffers["router_bias"] = ffn.router_bias.to(dtype)  # as open-mythos' `.to` leaves it
        before = ffn.router_bias.double()
        ffn.expert_load = torch.tensor([9, 0, 0, 0, 9])
        update_router_bias(model, 1e-3)
        torch.testing.assert_close(
            ffn.router_bias.double() - before, 1e-3 * torch.tensor([-1, 1, 1, 1, -1]).double(), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_wide_bias_decides_beside_low_precision(fast, grad):
    """Sums of bfloat16 logits and a float32 bias are not rounded to bfloat16, in prompts or decoding."""
    model = tiny_model()
    ffn = model.recurrent.block.ffn
    with torch.no_grad():
        ffn.router.weight.zero_()
        ffn.router_bias.copy_(0.5 + 1e-4 * torch.tensor([0, 4, 2, 3, 1]))  # the same five times in bfloat16
    model.to(torch.bfloat16)
    model = accelerate(model) if fast else model
    cache, ids = {}, tokens(2, 9)
    with torch.set_grad_enabled(grad), recording_routing(model):
        for start, end in ((0, 6), (6, 8), (8, 9)):
            model(ids[:, start:end], kv_cache=cache, start_pos=start)
        model(ids)
    assert len(ffn.recorded) == 4 * 4 and all(
        (calls.sort(-1).values == torch.tensor([1, 3])).all() for calls in ffn.recorded
    )


@pytest.mark.parametrize("trace", ["fake", "export", "strict export"])
def test_tracing_leaves_no_counts_behind(trace):
    """A fake tensor kept in a module could neither be copied nor added to."""
    model, ids = accelerate(tiny_model()).train(), tokens(2, 9)
    ffn = model.recurrent.block.ffn
    with recording_routing(model):
        if trace == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True):
                model(tokens(2, 9))
        else:
            torch.export.export(model, (ids,), strict=trace == "strict export")
    assert ffn.expert_load is None and not ffn.recorded
    copy.deepcopy(model)(ids)
    model(ids)
    assert ffn.expert_load.sum() > 0
