"""The fused loop step against `openmythos.RecurrentBlock.step`: numbers, gradients, contracts."""

import pytest
import torch
from torch import nn

import openmythos
from openmythos import MythosConfig
from openmythos.recurrence import ACTState
from openmythos_kernels.nn.recurrence import RecurrentBlock
from openmythos_kernels.ops.loop import loop_step
from openmythos_kernels.ops.loop.step import LOOP_STEP, LOOP_STEP_BACKWARD
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from tests.kit.compare import assert_same, swapped
from tests.kit.dtypes import ALL, LOW
from tests.kit.loop import call, op_arguments, with_gradients
from tests.kit.threads import for_each_number

SHAPES = [(2, 5, 24, 3), (1, 7, 97, 5), (3, 1, 31, 0), (1, 1, 64, 16), (1, 131, 13, 2)]  # B, T, dim, rank


def make_block(dim=24, rank=3, **fields):
    """A reference block in float64 without its core, since a step gets the core's output as an argument."""
    cfg = MythosConfig(
        vocab_size=8,
        dim=dim,
        n_heads=1,
        n_kv_heads=1,
        max_loop_iters=3,
        kv_lora_rank=4,
        q_lora_rank=4,
        qk_rope_head_dim=2,
        qk_nope_head_dim=2,
        v_head_dim=2,
        n_experts=1,
        n_experts_per_tok=1,
        n_shared_experts=0,
        expert_dim=2,
        lora_rank=rank,
        core_ffn="dense",
        ffn_dim=2,
        **{"act_threshold": 0.7, **fields},
    )
    block = openmythos.RecurrentBlock(cfg)
    block.block = nn.Identity()
    for p in block.parameters():
        nn.init.normal_(p, std=dim**-0.5 if p.shape[-1] == dim and p.dim() == 2 else 0.5)
    return block.double()


def make_inputs(B, T, dim, cumulative_p=(0.0, 1.0), running=0.7):
    """h, e, f and an ACT state after some loops, in float64; `cumulative_p` is a range."""
    state = ACTState(
        torch.randn(B, T, dim).double(),
        torch.empty(B, T).double().uniform_(*cumulative_p),
        torch.rand(B, T) < running,
        torch.rand(B, T).double(),
    )
    return [torch.randn(B, T, dim).double() for _ in range(3)], state


def run(block, states, state, t=1, last=False, same=False, seed=1):
    """One step and its gradients, for random gradients of the outputs: name -> tensor, or None without a gradient.

    Args:
        same: whether h is e, as in the first loop.
    """
    dtype = block.norm.weight.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(x, dtype):
        return x.to(dtype).clone().requires_grad_()

    h, e, f = (leaf(x, dtype) for x in states)
    h = e if same else h
    act = ACTState(leaf(state.h_out, dtype), leaf(state.cumulative_p, wide), state.running, leaf(state.ponder, wide))
    new, after, u = block.step(h, e, None, f, act, t, last)
    outputs = {"h": new, **{f"{k}'": v for k, v in after._asdict().items()}, **({} if last else {"u": u})}
    torch.manual_seed(seed)
    graded = [x for x in outputs.values() if x.is_floating_point()]
    # Every dtype can represent these values.
    torch.autograd.backward(graded, [torch.randn(x.shape).bfloat16().to(x.dtype) for x in graded])
    leaves = {"h": h, "e": e, "f": f, "h_out": act.h_out, "cumulative_p": act.cumulative_p, "ponder": act.ponder}
    leaves |= {k: p for k, p in block.named_parameters() if not k.startswith("block.")}
    return {k: v.detach() for k, v in outputs.items()} | {f"grad {k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("spend_remainder", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("B, T, dim, rank", SHAPES)
def test_fp64_equals_the_reference(B, T, dim, rank, last, spend_remainder):
    block = make_block(dim, rank, act_remainder="last" if spend_remainder else "drop")
    states, state = make_inputs(B, T, dim)
    expected = run(block, states, state, last=last)
    got = run(swapped(block, RecurrentBlock), states, state, last=last)
    if last and spend_remainder:
        # This loop's probability decides nothing but cumulative_p, which nothing reads after the last loop.
        assert got["grad act.halt.weight"] is got["grad act.halt.bias"] is None
        for results in (got, expected):
            del results["grad act.halt.weight"], results["grad act.halt.bias"]
    assert_same(got, expected)


@pytest.mark.parametrize(
    "cumulative_p, running, bias",
    [
        pytest.param((0, 0), 1.0, -50.0, id="none crosses"),
        pytest.param((0, 0), 1.0, 50.0, id="all halt at once"),
        pytest.param((0.7, 1), 0.0, 0.0, id="all halted before"),
        pytest.param((1.1, 1.5), 1.0, 0.0, id="cumulative_p above 1"),
    ],
)
def test_halting_cases(cumulative_p, running, bias):
    block = make_block()
    nn.init.constant_(block.act.halt.bias, bias)
    states, state = make_inputs(2, 9, 24, cumulative_p, running)
    expected = run(block, states, state)
    assert expected["running'"].any() == (bias < 0)
    assert_same(run(swapped(block, RecurrentBlock), states, state), expected)


def test_first_loop_in_which_state_and_input_are_one_tensor():
    block = make_block()
    states, state = make_inputs(2, 5, 24)
    fast = swapped(block, RecurrentBlock)
    assert_same(run(fast, states, state, same=True), run(block, states, state, same=True))


def test_frozen_parameters_get_no_gradient():
    block = make_block()
    for p in (block.injection.log_A, block.lora.B, block.norm.weight):
        p.requires_grad_(False)
    states, state = make_inputs(2, 5, 24)
    got = run(swapped(block, RecurrentBlock), states, state)
    assert got["grad lora.B"] is None
    assert_same(got, run(block, states, state))


@pytest.mark.parametrize("used", ["h", "h_out", "cumulative_p", "ponder", "u"])
def test_gradient_of_one_output_alone(used):
    block = make_block()
    (h, e, f), state = make_inputs(2, 5, 24)
    grads = []
    for cls in (openmythos.RecurrentBlock, RecurrentBlock):
        twin = swapped(block, cls)
        inputs = [x.clone().requires_grad_() for x in (h, e, f, *state[:2], state.ponder)]
        before = ACTState(*inputs[3:5], state.running, inputs[5])
        new, after, u = twin.step(*inputs[:2], None, inputs[2], before, 1, False)
        {"h": new, "u": u, **after._asdict()}[used].square().sum().backward()
        grads.append({str(i): x.grad for i, x in enumerate(inputs)} | {k: p.grad for k, p in twin.named_parameters()})
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("B, T, dim, rank", [(2, 67, 96, 8), (1, 7, 97, 5), (1, 1, 64, 16)])
def test_error_budget(B, T, dim, rank, dtype):
    draws = [budget_draw(B, T, dim, rank, dtype) for _ in range(6)]
    # ACT's scalars are float32, but computed from states rounded to dtype, so its ulp is allowed.
    assert_within_budget(*(pooled(results) for results in zip(*draws)), dtype=dtype)


def budget_draw(B, T, dim, rank, dtype):
    """Outputs and gradients of one step on random inputs: of the op, of the reference, of the reference in float64."""
    block = make_block(dim, rank).to(dtype).double()  # values that dtype can represent
    states, state = make_inputs(B, T, dim)
    states = [x.to(dtype).double() for x in states]
    h_out, cumulative_p, running, ponder = state
    state = ACTState(h_out.to(dtype).double(), cumulative_p.float().double(), running, ponder.float().double())
    grads_seed = int(torch.randint(1 << 30, ()))
    results = [
        run(swapped(block, cls).to(d), states, state, seed=grads_seed)
        for cls, d in (
            (RecurrentBlock, dtype),
            (openmythos.RecurrentBlock, dtype),
            (openmythos.RecurrentBlock, torch.float64),
        )
    ]
    assert torch.equal(*(result.pop("running'") for result in results[:2]))
    del results[2]["running'"]
    return results


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_decay_stays_below_one_for_any_parameters(dtype):
    huge = 1e30 if dtype != torch.float16 else 6e4
    extremes = torch.tensor([-huge, -20, -16.7, -16.6, -16.5, -1e-30, 0, 1, 4, 20, 21, huge, 2, 3, 5, 6], dtype=dtype)
    for log_dt in extremes:
        x = op_arguments(2, 3, len(extremes), 0, dtype)
        x |= {"log_A": extremes.clone(), "log_dt": log_dt.reshape(1), "h": torch.ones_like(x["h"])}
        for name in ("e", "f"):
            x[name] = torch.zeros_like(x[name])
        if (x["log_A"].double() + log_dt.double()).isnan().any():
            continue
        x = {k: v.requires_grad_(v.is_floating_point()) for k, v in x.items()}
        out = call(x)
        if dtype == torch.float32:
            assert (out.h >= 0).all() and (out.h < 1).all()
        else:
            assert (out.h >= 0).all() and (out.h <= 1).all()  # A < 1 in float32, but h' is rounded to dtype
        (out.h.sum() + out.h_out.sum() + out.u.sum()).backward()
        for name, v in x.items():
            assert v.grad is None or v.grad.isfinite().all(), name


def equal_bits(one, other):
    return all(torch.equal(a, b) for part in zip(one, other) for a, b in zip(*part, strict=True))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("enter", [True, False])
def test_direct_path_equals_dispatcher(dtype, enter):
    x = op_arguments(3, 7, 29, 4, dtype)
    direct = with_gradients(x, LOOP_STEP, enter=enter)
    dispatched = with_gradients(x, torch.ops.openmythos.loop_step.default, enter=enter)
    assert equal_bits(direct, dispatched)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 43), (2, 1111)])
def test_same_bits_for_any_number_of_threads_and_every_run(B, T):
    x = op_arguments(B, T, 48, 4, torch.float32)
    results = for_each_number((1, 2, 2, 3), lambda: with_gradients(x, loop_step))
    assert all(equal_bits(results[0], other) for other in results[1:])


def test_a_row_does_not_depend_on_other_rows():
    x = op_arguments(1, 9, 40, 4, torch.float32)
    whole = call(x)
    for i in range(9):
        one = {
            k: v[:, i : i + 1]
            if k in ("h", "e", "f", "lora_hidden", "h_out", "cumulative_p", "running", "ponder")
            else v
            for k, v in x.items()
        }
        assert all(torch.equal(a[:, i : i + 1], b) for a, b in zip(whole, call(one)))


def test_inputs_are_not_modified_and_may_be_strided():
    x = op_arguments(3, 8, 40, 4, torch.float32)
    expected = with_gradients(x, loop_step)
    rows = ("h", "e", "f", "lora_hidden", "h_out", "cumulative_p", "running", "ponder")
    strided = {k: torch.stack((v, v), 1)[:, 0] if k in rows else v for k, v in x.items()}
    strided["lora_B"] = x["lora_B"].t().contiguous().t()
    kept = {k: v.clone() for k, v in strided.items()}
    out = call(strided)
    assert all(torch.equal(a, b) for a, b in zip(out, expected[0]))
    assert all(torch.equal(strided[k], kept[k]) for k in kept)


@pytest.mark.parametrize("B, T, rank", [(0, 4, 2), (2, 0, 2), (0, 0, 0)])
def test_no_positions(B, T, rank):
    x = op_arguments(B, T, 24, rank, torch.float32)
    outputs, grads = with_gradients(x, loop_step)
    assert outputs[0].shape == outputs[5].shape == (B, T, 24) and outputs[2].shape == (B, T)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("enter", [True, False])
def test_opcheck_forward(enter):
    x = op_arguments(2, 3, 24, 2, torch.float64)
    x = {k: v.requires_grad_(v.is_floating_point() and k != "emb") for k, v in x.items()}
    call(x, lambda *args: torch.library.opcheck(LOOP_STEP.overload, args), enter=enter)


@pytest.mark.parametrize("absent", [(), (0,), (1, 3), (4,)])
def test_opcheck_backward(absent):
    x = op_arguments(2, 3, 24, 2, torch.float64)
    h_next, *_, p, rstd = call(x, LOOP_STEP)
    grads = [torch.randn_like(x[k]) for k in ("h", "h_out", "cumulative_p", "ponder", "e")]
    grads = [None if i in absent else g for i, g in enumerate(grads)]
    saved = [x[k] for k in ("h", "e", "lora_hidden", "cumulative_p", "running")] + [h_next, p, rstd]
    saved += [x[k] for k in ("lora_B", "log_A", "log_dt", "B", "halt_weight", "norm_weight", "emb")]
    torch.library.opcheck(LOOP_STEP_BACKWARD.overload, (*grads, *saved, 0.7, False))


@pytest.mark.parametrize(
    "name, value",
    [
        ("h", torch.zeros(2, 3, 24, dtype=torch.int32)),
        ("e", torch.zeros(2, 3, 23)),
        ("f", torch.zeros(2, 3, 24, dtype=torch.float64)),
        ("lora_hidden", torch.zeros(2, 3, 5)),
        ("cumulative_p", torch.zeros(2, 3, dtype=torch.bfloat16)),
        ("running", torch.zeros(2, 3)),
        ("lora_B", torch.zeros(2, 25)),
        ("log_dt", torch.zeros(())),
        ("halt_weight", torch.zeros(24)),
        ("norm_weight", torch.zeros(24, device="meta")),
        ("emb", torch.zeros(25)),
    ],
)
def test_wrong_arguments_are_named(name, value):
    x = op_arguments(2, 3, 24, 2, torch.float32) | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        call(x)
