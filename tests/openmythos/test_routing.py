import pytest
import torch

from openmythos import MoEFFN, plot_routing, recording_routing, routing_stats
from openmythos_kernels import accelerate
from tests.kit.tiny import enliven, tiny_config, tiny_model, tokens


def test_by_definition():
    moe = enliven(MoEFFN(tiny_config(n_experts=5, n_experts_per_tok=2)))
    x = [torch.randn(1, 7, 24) for _ in range(3)]
    with recording_routing(moe):
        for part in x:
            moe(part)
    stats = routing_stats(moe)[""]
    sets = [[set(row) for row in moe.route(part[0])[0].tolist()] for part in x]
    for t in range(3):
        load = torch.tensor([sum(e in s for s in sets[t]) for e in range(5)])
        assert torch.equal(stats.load[t], load)
        p = load[load > 0] / load.sum()
        torch.testing.assert_close(stats.entropy[t], -(p * p.log()).sum() / torch.tensor(5.0).log())
        for s in range(3):
            common = sum(len(a & b) for a, b in zip(sets[t], sets[s])) / 14
            torch.testing.assert_close(stats.overlap[t, s], torch.tensor(common))


def test_extremes():
    moe = MoEFFN(tiny_config(n_experts=4, n_experts_per_tok=1))
    even, one = torch.arange(8)[:, None] % 4, torch.zeros(8, 1, dtype=torch.int64)
    moe.recorded = [even, one, one[:5]]
    stats = routing_stats(moe)[""]
    torch.testing.assert_close(stats.entropy, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(stats.overlap[0, :2], torch.tensor([1.0, 0.25]))
    assert stats.overlap[0, 2].isnan() and stats.overlap[2, 2] == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_every_loop_of_a_model(swapped):
    model = tiny_model(core_layers=2, halting="off").eval()
    if swapped:
        accelerate(model)
    ids = tokens(2, 9)
    model(ids, n_loops=3)
    assert routing_stats(model) == {}
    with recording_routing(model), torch.no_grad():
        model(ids, n_loops=3)
    found = routing_stats(model)
    assert sorted(found) == ["recurrent.block.0.ffn", "recurrent.block.1.ffn"]
    for stats in found.values():
        assert (stats.load.sum(1) == 2 * 9 * model.cfg.n_experts_per_tok).all() and len(stats.load) == 3
        torch.testing.assert_close(stats.overlap.diagonal(), torch.ones(3))
    model(ids, n_loops=3)  # no longer recorded
    assert len(routing_stats(model)["recurrent.block.0.ffn"].load) == 3
    assert not any("recorded" in key for key in model.state_dict())


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    moe = MoEFFN(tiny_config(n_experts=4, n_experts_per_tok=1))
    moe.recorded = [torch.arange(8)[:, None] % 4, torch.zeros(8, 1, dtype=torch.int64)]
    plot_routing(routing_stats(moe)[""], tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 1000
