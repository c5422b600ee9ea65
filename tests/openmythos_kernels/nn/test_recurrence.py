"""The drop-in RecurrentBlock against the reference, over whole loops."""

import copy

import pytest
import torch
from torch import nn

import openmythos
from openmythos.recurrence import ACTState
from openmythos_kernels.nn.recurrence import RecurrentBlock
from tests.kit.compare import assert_same, swapped
from tests.kit.loop import run_block, small_block


def mythos_block(**fields):
    return small_block(std=0.2, **{"max_loop_iters": 3, "act_threshold": 0.8, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"act_remainder": "last"},
        {"h0": "zeros"},
        {"core_layers": 2},
        {"lora_rank": 0},
        {"injection": "residual"},
        {"injection": "parcae"},
        {"injection": "concat"},
        {"injection": "add"},
        {"injection": "residual", "lora_rank": 0},
        {"halting": "off"},
        {"halting": "off", "injection": "residual"},
        {"halting": "freeze"},
        {"halting": "freeze", "act_remainder": "last"},
        {"halting": "freeze", "injection": "residual", "lora_rank": 0},
    ],
    ids=str,
)
def test_whole_block_over_several_loops(fields):
    block = mythos_block(**fields).double()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    expected = run_block(copy.deepcopy(block), x, 5)
    halts_at_different_loops = expected["ponder"].unique().numel() > 3
    assert halts_at_different_loops or fields.get("halting") == "off"
    fast = swapped(block, RecurrentBlock)
    assert fast.backend().fast and fast.backend((x, x, x)).fast
    assert_same(run_block(fast, x, 5), expected, 1e-10)


def test_compiled_equals_eager():
    block = swapped(mythos_block(), RecurrentBlock)
    x = torch.randn(2, 6, 24)
    (h, e, f), state = [torch.randn(2, 6, 24) for _ in range(3)], ACTState.start(x)

    def two_steps(h, e, f):
        first, after, u = block.step(h, e, None, f, state, 0, False)
        second, after, _ = block.step(first, e, None, f + u, after, 1, True)
        return second, after.h_out, after.ponder

    results = []
    for function in (two_steps, torch.compile(two_steps, backend="aot_eager", fullgraph=True)):
        inputs = [v.clone().requires_grad_() for v in (h, e, f)]
        block.zero_grad()
        out = function(*inputs)
        sum(v.square().sum() for v in out).backward()
        results.append([*out, *(v.grad for v in inputs), *(p.grad for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_whole_block_without_halting_gives_the_halting_head_no_gradient():
    fast = swapped(mythos_block(halting="off"), RecurrentBlock)
    grads = run_block(fast, torch.randn(2, 6, 24), 5)
    assert grads["act.halt.weight"] is None and grads["act.halt.bias"] is None and grads["injection.B"].any()


@pytest.mark.parametrize("injection", ["mythos", "residual", "concat"])
def test_one_loop_that_gets_all_the_weight_gives_the_halting_head_no_gradient(injection):
    """None, as the reference: an optimizer would decay a parameter with a gradient of zeros."""
    block = mythos_block(act_remainder="last", injection=injection)
    grads = [run_block(b, torch.randn(2, 6, 24), 1) for b in (block, swapped(block, RecurrentBlock))]
    for found in grads:
        assert found["act.halt.weight"] is None and found["act.halt.bias"] is None


def test_inference_mode_then_training():
    block = swapped(mythos_block(), RecurrentBlock)
    x = torch.randn(1, 4, 24)
    with torch.inference_mode():
        block(x, x, openmythos.layers.rotary_table(4, 4, 10000.0))
    assert all(g is not None for k, g in run_block(block, x, 5).items() if k.startswith("injection"))


def test_autocast_uses_the_fused_step():
    block = swapped(mythos_block(), RecurrentBlock)
    twin = swapped(block, openmythos.RecurrentBlock)
    x = torch.randn(2, 6, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = run_block(block, x, 2), run_block(twin, x, 2)
    assert got["out"].dtype == expected["out"].dtype == torch.float32
    for name in ("out", "x", "injection.log_A", "norm.weight"):
        torch.testing.assert_close(got[name], expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item())


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda b: setattr(b.cfg, "injection", "residual"), "injection is not a plain ResidualInjection"),
        (lambda b: vars(b.cfg).update(injection="parcae", halting="off"), 'halting="off" with injection="parcae"'),
        (lambda b: b.norm.register_forward_hook(lambda *_: None), "norm has hooks"),
        (lambda b: b.act.register_forward_pre_hook(lambda *_: None), "act has hooks"),
        (lambda b: b.lora.register_full_backward_hook(lambda *_: None), "lora has hooks"),
        (lambda b: setattr(b, "norm", nn.RMSNorm(24)), "norm is not a plain RMSNorm"),
        (lambda b: setattr(b.act, "forward", b.act.forward), "act has a forward of its own"),
        (lambda b: b.injection.bfloat16(), "different dtypes"),
        (lambda b: b.to("meta"), ""),
    ],
)
def test_fallbacks_have_reasons(spoil, reason):
    block = swapped(mythos_block(), RecurrentBlock)
    assert block.backend().fast
    spoil(block)
    assert not block.backend().fast and reason in block.backend().reason


def test_states_of_different_dtypes_run_on_the_reference():
    block = swapped(mythos_block(), RecurrentBlock)
    x = torch.randn(1, 4, 24)
    assert "different dtypes" in block.backend((x, x.double(), x)).reason
    new, _, _ = block.step(x, x.double(), None, x, ACTState.start(x), 0, True)
    assert new.shape == x.shape
