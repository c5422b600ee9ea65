"""The loop over a shrinking batch: outputs and gradients equal the reference's, which computes everything."""

import copy
from unittest import mock

import pytest
import torch

import openmythos
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels import nn as fast
from tests.kit.compare import assert_same, swapped
from tests.kit.loop import run_block, small_block
from tests.kit.ranks import run_ranks
from tests.kit.thresholds import set_threshold


def make_block(**fields):
    return small_block(std=0.25, **{"act_threshold": 0.8, **fields}).double()


def run(block, x, n_loops=6, mask="causal", **options):
    return run_block(block, x, n_loops, CausalMask(0, x.shape[1]) if mask == "causal" else mask, **options)


def compare(block, x, n_loops=6, tolerance=1e-12, **options):
    """Compares ours with the reference; returns the (sequences, positions) that ours computed in each loop."""
    expected = run(copy.deepcopy(block), x, n_loops, **options)
    ours = swapped(block, fast.RecurrentBlock)
    shapes = []
    ours.block.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    got = run(ours, x, n_loops, **options)
    assert_same(got, expected, tolerance)
    return shapes


def halting_by_channel(block):
    """Makes channel 0 of every state equal to that of the input, and uses it as the halting logit."""
    with torch.no_grad():
        for name, p in block.block.named_parameters():
            if name.endswith(("wo.weight", "down.weight")):
                p[0] = 0.0
        block.norm.weight[0] = block.act.halt.bias[0] = 0.0
        block.lora.B[:, 0] = 0.0
        block.injection.log_A[0], block.injection.B[0] = 30.0, 1.0
        block.act.halt.weight.zero_()
        block.act.halt.weight[0, 0] = 1.0


def staggered(block, batch=5, tokens=9):
    """Inputs in which later sequences and later positions halt earlier."""
    halting_by_channel(block)
    x = torch.randn(batch, tokens, 24).double()
    x[..., 0] = (0.05 + 0.15 * torch.arange(batch)[:, None] + 0.03 * torch.arange(tokens)).double().logit()
    return x


@pytest.mark.parametrize("mask", ["causal", None, "tensor", "per sequence", "biased"])
@pytest.mark.parametrize("fields", [{}, {"act_remainder": "last"}, {"core_layers": 2}, {"core_ffn": "moe"}], ids=str)
def test_trimmed_equals_whole(fields, mask):
    block = make_block(**fields)
    x = staggered(block)
    # With these masks, positions after the last running one are not needed.
    future_hidden = mask in ("causal", "tensor", "per sequence")
    if mask in ("tensor", "per sequence", "biased"):
        bias = 0.1 * torch.randn(9, 9).double() if mask == "biased" else 0.0
        mask = (CausalMask(0, 9).additive(9, x) + bias).expand(5 if mask == "per sequence" else 1, 1, 9, 9).contiguous()
    shapes = compare(block, x, mask=mask)
    assert shapes[0] == (5, 9) and shapes[-1][0] < 5, shapes  # some sequences exited early
    if future_hidden:
        assert shapes[-1][1] < 9, shapes
    else:
        assert shapes[-1][1] == 9


@pytest.mark.parametrize("injection", ["residual", "parcae", "concat", "add"])
def test_every_injection(injection):
    block = make_block(injection=injection)
    x = staggered_by_bias(block)
    compare(block, x, tolerance=1e-10)


def staggered_by_bias(block):
    with torch.no_grad():
        block.act.halt.bias.fill_(-0.5)
    return torch.randn(4, 7, 24).double()


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_no_position_or_every_position_halts_in_the_first_loop(bias):
    block = make_block()
    with torch.no_grad():
        block.act.halt.weight.zero_()
        block.act.halt.bias.fill_(bias)
    shapes = compare(block, torch.randn(3, 5, 24).double())
    assert shapes == [(3, 5)] * (6 if bias < 0 else 1)


@pytest.mark.parametrize("remainder", ["drop", "last"])
@pytest.mark.parametrize("halting", ["evolve", "off"])
@pytest.mark.parametrize("counts", [[1, 8, 3, 3], [2, 2, 2, 2], [5, 1, 1, 1]])
def test_loops_per_sequence(counts, halting, remainder):
    block = make_block(halting=halting, act_remainder=remainder)
    x = torch.randn(4, 7, 24).double()
    with torch.no_grad():
        block.act.halt.bias.fill_(-1.5)
    shapes = compare(block, x, counts)
    if halting == "off":
        assert [rows for rows, _ in shapes] == [sum(n > t for n in counts) for t in range(max(counts))]


@pytest.mark.parametrize("halting", ["evolve", "off"])
@pytest.mark.parametrize("n_loops, grad_loops", [(6, 2), (6, 9), ([2, 6, 4, 5], 2), ([1, 1, 3, 5], 1)], ids=str)
def test_truncated_backpropagation(n_loops, grad_loops, halting):
    block = make_block(halting=halting)
    with torch.no_grad():
        block.act.halt.bias.fill_(-3.0)
    compare(block, torch.randn(4, 7, 24).double(), n_loops, grad_loops=grad_loops)


@pytest.mark.parametrize("options", [{}, {"grad_loops": 3}])
@pytest.mark.parametrize("halting", ["evolve", "off"])
def test_checkpointed_loops(halting, options):
    block = make_block(halting=halting)
    x = staggered(block)
    compare(block, x, checkpoint_loops=True, **options)
    for cls in (openmythos.RecurrentBlock, fast.RecurrentBlock):
        block.__class__ = cls
        plain, kept = (run(block, x, checkpoint_loops=c, **options) for c in (False, True))
        for name in plain:
            torch.testing.assert_close(kept[name], plain[name], rtol=1e-12, atol=1e-12)


def test_truncation_reaches_only_the_last_loops():
    """By definition, the state before the loops with gradients is a constant."""
    block = make_block(halting="off")
    x = torch.randn(2, 5, 24).double()
    freqs = rotary_table(4, 5, 10000.0).to(torch.complex128)
    got = run(copy.deepcopy(block), x, 5, grad_loops=2)
    leaf = x.clone().requires_grad_()
    states = []
    with torch.no_grad():
        hook = block.injection.register_forward_hook(lambda *args: states.append(args[2]))
        block(x, x, freqs, CausalMask(0, 5), 3)
        hook.remove()
    h = states[-1]
    for t in (3, 4):
        u = block.injection.enter(h, leaf, t, block.norm)
        f = block.block(u, freqs, CausalMask(0, 5))
        h = block.injection(h, leaf, f + block.lora(f, t))
    torch.manual_seed(1)
    (h * torch.randn_like(h)).sum().backward()
    torch.testing.assert_close(got["x"], leaf.grad)
    torch.testing.assert_close(got["injection.B"], block.injection.B.grad)


def test_rotary_rows_per_sequence():
    block = make_block()
    x = staggered(block)
    freqs = rotary_table(4, 16, 10000.0).to(torch.complex128)
    freqs = torch.stack([freqs[b : b + 9] for b in range(5)])
    assert compare(block, x, freqs=freqs)[-1][0] < 5


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_late_exit_changes_nothing(lag, monkeypatch):
    """On a GPU, the host learns some loops late that no position runs."""
    set_threshold(monkeypatch, "early_exit_lag", lag)
    block = make_block()
    block.trim = False
    with torch.no_grad():
        block.act.halt.weight.zero_()
        block.act.halt.bias.fill_(0.0)  # p = 0.5 per loop, so the second loop crosses 0.8
    shapes = compare(block, torch.randn(3, 5, 24).double())
    assert shapes == [(3, 5)] * (2 + lag)


def test_without_trimming_everything_is_computed():
    block = make_block()
    x = staggered(block)
    block.__class__ = fast.RecurrentBlock
    block.trim = False
    shapes = []
    block.block.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    run(block, x)
    assert set(shapes) == {(5, 9)}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(grad_loops=0), "grad_loops = 0"),
        (dict(n_loops=[1, 2]), "one per sequence, of which there are 5"),
        (dict(n_loops=[1, 2, 3, 4, 0]), "must be an integer >= 1"),
    ],
)
@pytest.mark.parametrize("cls", [openmythos.RecurrentBlock, fast.RecurrentBlock])
def test_bad_arguments(cls, options, message):
    block = make_block()
    block.__class__ = cls
    x = torch.randn(5, 3, 24).double()
    with pytest.raises(ValueError, match=message):
        block(x, x, rotary_table(4, 3, 1e4), None, **options)


def test_fixed_depth_compiles_whole_and_runs_on_fake_tensors():
    block = make_block(core_ffn="dense").float()
    block.__class__ = fast.RecurrentBlock
    x = torch.randn(2, 5, 24)
    freqs = rotary_table(4, 5, 10000.0)
    cos = torch.view_as_real(freqs)

    def loop(x):
        return block(x, x, torch.view_as_complex(cos), CausalMask(0, 5), 3)

    compiled = torch.compile(loop, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), loop(x), rtol=1e-5, atol=1e-5)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = mode.from_tensor(x)
        assert block(fake, fake, freqs, CausalMask(0, 5), 3).shape == x.shape


def _train_both_ways(rank: int):
    return [_train(rank, agree) for agree in (False, True)]


def _train(rank: int, agree: bool):
    """Trains a sharded block; the sequence of rank 0 halts in the first loop, that of rank 1 in the third."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    block = make_block()
    halting_by_channel(block)
    block.__class__ = fast.RecurrentBlock
    block.agree = agree
    x = torch.randn(2, 2, 6, 24).double()
    x[0, ..., 0], x[1, ..., 0] = 2.0, -0.9  # p = 0.88 and 0.29
    freqs = rotary_table(4, 6, 10000.0).to(torch.complex128)
    alone = copy.deepcopy(block)
    alone.__class__ = openmythos.RecurrentBlock
    fully_shard(block.block, mesh=init_device_mesh("cpu", (2,)))
    calls = []
    block.block.register_forward_pre_hook(lambda *_: calls.append(1))
    block(x[rank], x[rank], freqs, CausalMask(0, 6), 6).square().sum().backward()
    with mock.patch("openmythos.recurrence._free_to_exit", lambda h: True):
        sum(alone(y, y, freqs, CausalMask(0, 6), 6).square().sum() for y in x).div(2).backward()
    worst = 0.0
    for p, q in zip(block.block.parameters(), alone.block.parameters()):
        worst = max(worst, float((p.grad.full_tensor() - q.grad).abs().max()))
    return len(calls), worst


def test_ranks_run_the_same_loops():
    """All six, or with `agree` the three that some rank needs."""
    for loops, results in zip((6, 3), zip(*run_ranks(_train_both_ways)), strict=True):
        assert [n for n, _ in results] == [loops, loops]
        assert max(worst for _, worst in results) < 1e-12


def test_small_savings_are_not_trimmed(monkeypatch):
    block = make_block()
    x = staggered(block)
    set_threshold(monkeypatch, "early_exit_share", 1.0)
    shapes = compare(block, x)
    assert set(shapes[:-1]) == {(5, 9)} or all(rows in (0, 5) for rows, _ in shapes)
