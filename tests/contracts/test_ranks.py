"""A swapped model on two gloo ranks, by DDP or FSDP2, equals one process on both batches.

The sequences of the two ranks halt at different depths.
"""

from __future__ import annotations

import copy

import torch

import openmythos_kernels
from tests.conformance.test_ranks import count_loops, model_that_halts_by_token
from tests.kit.ranks import run_ranks

BATCHES = [torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 0, 1, 1]])]  # token 0 halts at once, token 1 never


def _train(rank: int):
    return [_run(rank, way) for way in ("ddp", "fsdp")]


def _run(rank: int, way: str):
    model = openmythos_kernels.accelerate(model_that_halts_by_token())
    alone = copy.deepcopy(model)
    loops = count_loops(model)
    if way == "ddp":
        whole = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (model.recurrent.block, *model.coda, model):
            fully_shard(part, mesh=mesh)
        whole = model
    whole(BATCHES[rank]).logsumexp(-1).mean().backward()

    (sum(alone(ids).logsumexp(-1).mean() for ids in BATCHES) / 2).backward()
    scale = torch.stack([p.grad.norm() for p in alone.parameters()]).norm()
    worst = 0.0
    for found, single in zip(model.parameters(), alone.parameters()):
        grad = found.grad.full_tensor() if way == "fsdp" else found.grad
        worst = max(worst, float((grad - single.grad).norm() / scale))
    return len(loops), worst


def test_two_ranks_equal_one_process():
    for results in run_ranks(_train):
        assert [loops for loops, _ in results] == [4, 4]
        assert max(worst for _, worst in results) < 1e-5
