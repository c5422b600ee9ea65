"""A training step as a graph, with a stand-in for CUDA graphs (`nn/test_on_gpu.py` has real ones)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from openmythos import MoEFFN, OpenMythos
from openmythos_kernels import accelerate, graphed_step
from tests.kit import recorded_graph
from tests.kit.tiny import enliven, relative, tiny_config

pytestmark = pytest.mark.usefixtures("needs_extension")

TOKENS = 12
CONFIGS = [
    {},
    {"halting": "off"},
    {"halting": "freeze"},
    {"injection": "parcae", "h0": "zeros"},
    {"act_remainder": "last"},
    {"core_ffn": "dense"},
    {"attn_type": "gqa"},
]


def loss(model, ids, targets, n_loops=3):
    return F.cross_entropy(model(ids, n_loops=n_loops).flatten(0, 1), targets.flatten())


def batches(count, rows=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(32, (2, rows, TOKENS), generator=g).unbind() for _ in range(count)]


def make(**fields):
    model = accelerate(enliven(OpenMythos(tiny_config(vocab_size=32, **fields)), halt=0.3)).train()
    return model, copy.deepcopy(model)


def step_of(model, function=loss, **options):
    step = graphed_step(model, function, **options)
    assert step.refused == "the model is on the cpu"
    step.refused = ""
    return step


def same(model, other, exactly=True):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad) if exactly else relative(p.grad, q.grad) < 1e-5, name


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_replays_have_the_bits_of_eager_steps(fields):
    """Routing and halting change from batch to batch, and weights from step to step."""
    model, other = make(**fields)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, other)]
    step = step_of(other, warmup=1)
    with recorded_graph.on_cpu():
        for t, (ids, targets) in enumerate(batches(5)):
            model.zero_grad()
            with recorded_graph.graph(recorded_graph.Graph()):  # positions that have halted stay, as in a capture
                expected = loss(model, ids, targets)
            expected.backward()
            found = step(ids, targets)
            assert bool(step._graphs) == (t > 0) and not step.refused
            assert torch.equal(found, expected) if t else torch.allclose(found, expected)
            assert not found.requires_grad
            same(model, other, exactly=t > 0)  # an eager step may take other paths, e.g. over halted positions
            for ours, theirs in zip(*(filter(is_moe, m.modules()) for m in (model, other))):
                if t == 0:
                    ours.expert_load = theirs.expert_load = None
                else:  # added to those of the steps before
                    assert torch.equal(ours.expert_load, theirs.expert_load)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():  # no bit of the first step's difference stays
                for p, q in zip(other.parameters(), model.parameters()):
                    p.copy_(q)


def is_moe(module):
    return isinstance(module, MoEFFN)


def test_each_number_of_loops_has_a_graph_up_to_the_most():
    model, _ = make()
    step = step_of(model, warmup=0, most=2)
    (ids, targets), *_ = batches(1)
    with recorded_graph.on_cpu():
        found = [step(ids, targets, n_loops=n) for n in (1, 2, 3, 1, 2, 3)]
    assert len(step._graphs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:]))
    assert len({float(x) for x in found[:3]}) == 3


def test_weights_that_moved_are_captured_again():
    model, other = make()
    step = step_of(model, warmup=0)
    (ids, targets), *_ = batches(1)
    with recorded_graph.on_cpu():
        step(ids, targets)
        for p in model.parameters():
            p.data = p.data.clone() * 0.5
        found = step(ids, targets)
    with torch.no_grad():
        for p in other.parameters():
            p *= 0.5
    torch.testing.assert_close(found, loss(other, ids, targets).detach())


def test_what_the_host_reads_is_refused_and_runs_eagerly():
    model, _ = make()
    step = step_of(model, lambda *args: loss(*args) * (2 if float(model.head.weight.sum()) > 0 else 1), warmup=0)
    (ids, targets), *_ = batches(1)
    with recorded_graph.on_cpu():
        step(ids, targets)
        assert "the host reads" in step.refused
        assert step(ids, targets).isfinite()
    assert model.head.weight.grad is not None
    layer = next(filter(is_moe, model.modules()))
    assert int(layer.expert_load.sum()) > 0  # the failed capture's are not counted; the eager steps' are


def test_results_in_tuples_and_dicts_outlive_the_next_step():
    model, _ = make()
    step = step_of(model, lambda *args: (loss(*args), {"twice": loss(*args) * 2}), warmup=0)
    with recorded_graph.on_cpu():
        first, second = (step(*batch) for batch in batches(2))
    assert float(first[0]) != float(second[0])
    torch.testing.assert_close(first[1]["twice"], first[0] * 2)


def test_on_a_cpu_steps_are_eager():
    model, other = make()
    (ids, targets), *_ = batches(1)
    step = graphed_step(model, loss)
    for _ in range(2):  # gradients are replaced, not added
        found = step(ids, targets)
    expected = loss(other, ids, targets)
    expected.backward()
    assert torch.equal(found, expected)
    same(model, other)
