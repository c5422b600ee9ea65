"""Data parallelism, in 2 gloo processes: ranks run the same loops, and sum their expert loads."""

from __future__ import annotations

import torch

from openmythos import MoEFFN, OpenMythos, update_router_bias
from tests.kit.ranks import run_ranks
from tests.kit.tiny import enliven, tiny_config


def model_that_halts_by_token(**fields) -> OpenMythos:
    """Token 0 halts in the first loop, token 1 never."""
    model = enliven(OpenMythos(tiny_config(prelude_layers=0, **fields)))
    with torch.no_grad():
        model.embed.weight[0] = 20.0
        model.embed.weight[1] = -20.0
        model.recurrent.act.halt.weight.fill_(1.0)
        model.recurrent.act.halt.bias.zero_()
        model.recurrent.injection.B.fill_(1.0)
    return model


def count_loops(model) -> list:
    loops = []
    model.recurrent.act.register_forward_pre_hook(lambda module, args: loops.append(1))
    return loops


def test_alone_each_batch_stops_when_all_have_halted():
    for token, expected in [(0, 1), (1, 4)]:
        model = model_that_halts_by_token()
        loops = count_loops(model)
        model(torch.full((1, 3), token))
        assert len(loops) == expected


def _train_sharded(rank: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, alone = model_that_halts_by_token(), model_that_halts_by_token()
    mesh = init_device_mesh("cpu", (2,))
    for part in (model.recurrent.block, *model.coda, model):
        fully_shard(part, mesh=mesh)
    loops = count_loops(model)
    batches = [torch.full((1, 3), token) for token in (0, 1)]
    model(batches[rank]).logsumexp(-1).mean().backward()

    (sum(alone(ids).logsumexp(-1).mean() for ids in batches) / 2).backward()
    worst = 0.0
    scale = torch.stack([p.grad.norm() for p in alone.parameters()]).norm()
    for sharded, single in zip(model.parameters(), alone.parameters()):
        worst = max(worst, float((sharded.grad.full_tensor() - single.grad).norm() / scale))
    return len(loops), worst


def test_ranks_that_halt_at_different_depths_run_the_same_loops_under_fsdp():
    """In upstream one rank leaves the loop, and the other waits for its shards forever."""
    results = run_ranks(_train_sharded)
    assert [loops for loops, _ in results] == [4, 4]
    assert max(worst for _, worst in results) < 1e-5


def _balance(rank: int):
    """Each rank sends its tokens to expert `rank`; then rank 1 alone has tokens. Returns the bias after each update."""
    torch.manual_seed(0)
    moe = MoEFFN(tiny_config(n_experts=3, n_experts_per_tok=1)).train()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[rank] = 1.0
    moe(torch.ones(1, 6, 24))
    update_router_bias(moe, rate=0.5)
    first = moe.router_bias.tolist()
    if rank == 1:
        moe(torch.ones(1, 6, 24))
    update_router_bias(moe, rate=0.25)
    return first, moe.router_bias.tolist(), moe.expert_load


def test_expert_loads_are_summed_over_ranks():
    """Loads (6, 6, 0), mean 4: alone each rank would find the other's expert idle. Then (0, 6, 0), mean 2."""
    assert run_ranks(_balance) == [([-0.5, -0.5, 0.5], [-0.25, -0.75, 0.75], None)] * 2
