"""The fast MoE layer, its parameters sharded over ranks (2 gloo processes)."""

import copy

import torch

import openmythos
from openmythos_kernels.nn import MoEFFN
from tests.kit.ranks import run_ranks
from tests.kit.tiny import enliven, tiny_config


def _train(rank: int):
    """The layer twice in a row, as a loop does; the ranks' tokens go to different experts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = enliven(openmythos.MoEFFN(tiny_config())).double()
    alone = copy.deepcopy(layer)
    layer.__class__ = MoEFFN
    backend = layer.backend().backend
    x = torch.randn(2, 1, 5, 24).double()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer(layer(x[rank])).sin().sum().backward()
    (sum(alone(alone(y)).sin().sum() for y in x) / 2).backward()
    pairs = zip(layer.parameters(), alone.parameters())
    return backend, max(float((p.grad.full_tensor() - q.grad).abs().max()) for p, q in pairs)


def test_sharded_equals_alone():
    for backend, worst in run_ranks(_train):
        assert backend == "cpu" and worst < 1e-12
