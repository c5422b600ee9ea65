import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openmythos import recording_routing, routing_stats
from openmythos.exits import LatentExit
from openmythos_kernels import accelerate
from openmythos_kernels.depth import depth_stats, plot_positions, position_depths
from openmythos_kernels.serve import Engine, speculative_stream
from openmythos_kernels.serve.speculation import _Stream
from tests.kit.tiny import tiny_model, tokens


@pytest.mark.parametrize("fast", [False, True])
def test_exit_depths_agree_with_the_ponder_cost(fast):
    model = tiny_model(act_threshold=0.8, max_loop_iters=6)
    model = accelerate(model) if fast else model
    with depth_stats(model) as stats:
        _, ponder = model(tokens(3, 7), return_ponder=True)
    depths = (ponder.ceil() - 1).long().flatten()  # N + R with 0 < R <= 1
    assert stats.histogram == torch.bincount(depths)[1:].tolist() and len(set(depths.tolist())) > 1
    assert stats.mean_depth == pytest.approx(depths.double().mean().item())
    assert "mean" in str(stats) and not model.recurrent.watchers
    assert 0 <= stats.saved(6) < 1
    if fast:
        assert stats.saved(6) >= 1 - depths.max().item() / 6


@pytest.mark.parametrize("fast", [False, True])
def test_every_generated_position_is_counted(fast):
    model = tiny_model(act_threshold=0.8)
    model = accelerate(model) if fast else model
    prompt, new = tokens(2, 3), 10
    with depth_stats(model) as outer:
        with depth_stats(model) as stats:
            ids = model.generate(prompt, new, temperature=0)
        plain = model.generate(prompt, new, temperature=0)
    assert torch.equal(ids, plain) and torch.equal(ids, model.generate(prompt, new, temperature=0))
    ponder = model(ids[:, :-1], return_ponder=True)[1]
    depths = (ponder.ceil() - 1).long().flatten()
    assert stats.histogram == torch.bincount(depths)[1:].tolist() and sum(stats.histogram) == 2 * 12
    assert outer.histogram == [2 * n for n in stats.histogram]


@pytest.mark.parametrize("exit", [None, "act", LatentExit(0.3)], ids=["configured", "act", "latent"])
@pytest.mark.parametrize("halting", ["freeze", "evolve", "off"])
def test_served_tokens_are_counted_as_generated_ones(halting, exit, needs_extension):
    model = accelerate(tiny_model(halting=halting, act_threshold=0.8, max_loop_iters=6).double())
    prompts, new = [tokens(7, seed=1), tokens(4, seed=2)], 5
    with depth_stats(model) as generated:
        for prompt in prompts:
            model.generate([prompt], new, temperature=0, exit=exit)
    engine = Engine(model, slots=2, chunk=3)
    with depth_stats(model) as served:
        handles = [engine.submit(prompt, new, temperature=0, exit=exit) for prompt in prompts]
        for handle in handles:
            handle.result()
    assert served.histogram == generated.histogram and sum(served.histogram) == (halting != "off" or bool(exit)) * 19
    assert served.saved(6) == pytest.approx(generated.saved(6)) or (halting == "evolve" and not exit)
    if halting == "freeze" or exit:
        depths = [depth for handle in handles for depth in handle.depths]
        assert served.histogram == torch.bincount(torch.tensor(depths))[1:].tolist() and len(set(depths)) > 1


@pytest.mark.parametrize("halting", ["freeze", "evolve"])
def test_speculation_counts_what_it_keeps(halting, needs_extension, monkeypatch):
    model, prompt, new = accelerate(tiny_model(halting=halting, act_threshold=0.8).double()), tokens(6), 17
    found, rounds = [], []
    settle = _Stream._settle

    def counted(self, rows, count):
        rounds.append(len(rows.loop) - count)
        settle(self, rows, count)

    monkeypatch.setattr(_Stream, "_settle", counted)
    for pair, temperature in (((1, 0), 0), ((1, 3), 0), ((1, 3), 5)):
        with depth_stats(model) as stats:
            list(speculative_stream(model, prompt, new, speculate=pair, temperature=temperature, seed=0))
        found.append(stats.histogram)
    assert found[0] == found[1] and [sum(histogram) for histogram in found] == [22, 22, 22]
    assert any(rounds)  # drafts were rejected


@pytest.mark.parametrize("fast", [False, True])
def test_recomputation_in_the_backward_is_not_counted(fast):
    model = tiny_model(act_threshold=0.8).train()
    model = accelerate(model) if fast else model
    ids, found = tokens(3, 6), []

    def forward(**options):
        return model(ids, **options)

    def as_a_user(ids):
        return checkpoint(model, ids, use_reentrant=False)

    for call in (forward, lambda: forward(checkpoint_loops=True), lambda: as_a_user(ids)):
        model.recurrent.block.ffn.expert_load = None
        with depth_stats(model) as stats, recording_routing(model):
            call().sum().backward()
        rows = routing_stats(model)["recurrent.block.ffn"].load.tolist()
        found.append((stats.histogram, rows, model.recurrent.block.ffn.expert_load.tolist()))
    assert found[1] == found[2] == found[0] and sum(found[0][0]) == 18 and len(found[0][1]) == 4
    assert [sum(column) for column in zip(*found[0][1])] == found[0][2]


@pytest.mark.parametrize("fast", [False, True])
def test_loads_of_truncated_backpropagation(fast):
    model = tiny_model(act_threshold=5.0).train()  # no position halts in 4 loops
    model = accelerate(model) if fast else model
    loads = []
    for options in ({}, dict(grad_loops=1), dict(grad_loops=1, checkpoint_loops=True)):
        model.recurrent.block.ffn.expert_load = None
        model(tokens(3, 6), **options).sum().backward()
        loads.append(model.recurrent.block.ffn.expert_load.tolist())
    assert loads[0] == loads[1] == loads[2] and sum(loads[0]) == 18 * 2 * 4


def test_a_model_without_recurrent_block_raises():
    with pytest.raises(ValueError, match="no recurrent block"), depth_stats(torch.nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("halting, exit", [("evolve", None), ("freeze", None), ("off", "latent"), ("evolve", "head")])
def test_depth_of_each_position(halting, exit, fast, tmp_path):
    model = tiny_model(act_threshold=0.8, max_loop_iters=6, halting=halting)
    model, ids = accelerate(model) if fast else model, tokens(2, 7)
    exit = LatentExit(0.3) if exit == "latent" else exit
    depths = position_depths(model, ids, exit=exit)
    with torch.no_grad(), depth_stats(model) as stats:
        model(ids, exit=exit)
    assert stats.histogram == torch.bincount(depths.flatten())[1:].tolist()
    plot_positions(depths[0], list("abcdefg"), tmp_path / "depths.png")
    assert (tmp_path / "depths.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="one for each of the tokens"):
        plot_positions(depths[0], list("abc"), tmp_path / "depths.png")


def test_without_halting_there_are_no_depths():
    with pytest.raises(ValueError, match="exit = None"):
        position_depths(tiny_model(halting="off"), tokens(1, 3))
