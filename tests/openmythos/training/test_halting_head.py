"""The halting head that is fitted on a model's states: its labels, its error, and what stays as it was."""

import pytest
import torch

from openmythos.calibrate import counting_loops
from openmythos.training import evaluate, fit_halting
from openmythos.training.halting_head import halting_error, settled_states
from openmythos_kernels import accelerate
from tests.kit.tiny import tiny_model, tokens

LOOPS = 4


def build(fast=False, **fields):
    model = tiny_model(halting="off", **fields).double()
    return accelerate(model) if fast else model


def batches(count=2, seed=0):
    return [(tokens(4, 12, seed=seed + i), tokens(4, 12, seed=seed + 50 + i)) for i in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_state_is_settled_once_later_loops_agree(chunk):
    model, data = build(), batches()
    states, settled = settled_states(model, data, LOOPS, chunk)
    expected = []
    for ids, _ in data:
        best = [model(ids, n_loops=t + 1).argmax(-1) for t in range(LOOPS)]
        for t in range(LOOPS - 1):
            same = torch.ones_like(ids, dtype=torch.bool)
            for later in best[t:]:
                same &= later == best[-1]
            expected.append(same.flatten())
    assert torch.equal(settled, torch.cat(expected)) and 0 < settled.double().mean() < 1
    assert states.shape == (len(settled), model.cfg.dim)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("core_layers, injection", [(1, "mythos"), (2, "concat")])
def test_the_error_falls_and_no_other_weight_moves(core_layers, injection, fast):
    model = build(fast, core_layers=core_layers, injection=injection, lora_rank=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    new = settled_states(model, batches(4, seed=9), LOOPS)
    guess = new[1].double().mean()
    unfitted = halting_error(model, *new)
    fit = fit_halting(model, batches(16), LOOPS)
    assert fit.after < fit.before and fit.states == 16 * 4 * 12 * (LOOPS - 1)
    # On text that it has not seen it knows more than how often a state is settled.
    entropy = -(guess * guess.log() + (1 - guess) * (1 - guess).log())
    assert halting_error(model, *new) < min(unfitted, 0.98 * entropy)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"recurrent.act.halt.weight", "recurrent.act.halt.bias"}
    assert all(p.grad is None for p in model.parameters())


def test_it_is_the_best_head_there_is():
    """The gradient of error and penalty is zero."""
    model, data = build(), batches(8)
    fit_halting(model, data, LOOPS, penalty=1e-2, iterations=500)
    states, settled = settled_states(model, data, LOOPS)
    normal = (states - states.mean(0)) / states.std(0)
    weight = (model.recurrent.act.halt.weight[0].detach() * states.std(0)).requires_grad_()
    bias = (model.recurrent.act.halt(states)[:, 0] - normal @ weight).mean().detach().requires_grad_()
    p = torch.sigmoid(normal @ weight + bias)
    wanted = settled.double()
    loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean() + 1e-2 * weight.square().sum()
    for on in torch.autograd.grad(loss, [weight, bias]):
        assert on.abs().max() < 1e-5


@pytest.mark.parametrize("fast", [False, True])
def test_the_exit_reads_it(fast):
    model, data = build(fast), batches(8)
    fit_halting(model, data, LOOPS)
    whole = evaluate(model, data, 8, n_loops=LOOPS)
    with counting_loops(model) as count:
        early = evaluate(model, data, 8, n_loops=LOOPS, exit="head")
    assert 1 < count.mean < LOOPS and count.positions == 8 * 48
    with counting_loops(model) as count:
        evaluate(model, data, 8, n_loops=LOOPS)
    assert early != whole and count.mean != count.mean  # nothing halts without


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"n_loops = 1: must be >= 2"):
        fit_halting(build(), batches(), 1)
    with pytest.raises(ValueError, match=r"data: got no batch"):
        fit_halting(build(), [], LOOPS)
    with pytest.raises(ValueError, match=r"penalty = -1: must be >= 0"):
        fit_halting(build(), batches(), LOOPS, penalty=-1)
