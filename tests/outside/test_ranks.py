"""A small version of open-mythos' multi-GPU script, FSDP with its wrap policy, on two gloo ranks; also FSDP2 and DDP.

Models are sharded before or after `accelerate`. Losses and gradients must equal those of one process on the batches of
both ranks, and `report` must say what runs.
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import openmythos
from openmythos_kernels import accelerate, report
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tokens
from tests.kit.upstream import load_upstream
from tests.outside.works import make

BATCHES = [tokens(2, 9, seed=10), tokens(2, 9, seed=11)]
STEPS, RATE = 3, 0.05


def blocks(package: str) -> set[type]:
    """The classes in the wrap policy of the script."""
    source = openmythos if package == "openmythos" else load_upstream()
    return {source.TransformerBlock, source.RecurrentBlock}


def fsdp1(model: nn.Module, classes: set[type], use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=ModuleWrapPolicy(classes),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )


def fsdp2(model: nn.Module, classes: set[type]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in reversed([m for m in model.modules() if isinstance(m, tuple(classes))]):  # inner modules first
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model: nn.Module, classes: set[type]) -> nn.Module:
    # open-mythos runs only chosen experts, so some have no gradient on a rank.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WAYS = {
    "fsdp1, flat": functools.partial(fsdp1, use_orig_params=False),
    "fsdp1, original parameters": functools.partial(fsdp1, use_orig_params=True),
    "fsdp2": fsdp2,
    "ddp": ddp,
}


def units(whole: nn.Module, way: str) -> int:
    """The number of modules that shard their own weights."""
    if way == "fsdp2":
        from torch.distributed.fsdp import FSDPModule

        return sum(isinstance(m, FSDPModule) for m in whole.modules())
    from torch.distributed.fsdp import FullyShardedDataParallel

    return sum(isinstance(m, FullyShardedDataParallel) for m in whole.modules())


def full_gradients(whole: nn.Module, way: str) -> dict[str, torch.Tensor]:
    """Name in the unwrapped model -> unsharded gradient, or None."""

    def named():
        for name, p in whole.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            grad = None if p.grad is None else p.grad.full_tensor() if way == "fsdp2" else p.grad.clone()
            yield name, grad

    if not way.startswith("fsdp1"):
        return dict(named())
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(whole, with_grads=way != "fsdp1, flat"):
        return dict(named())


def state(whole: nn.Module, way: str) -> dict[str, torch.Tensor]:
    """The unsharded state_dict, as in a checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if way == "ddp":
        return whole.module.state_dict()
    if way == "fsdp2":
        return get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    with FullyShardedDataParallel.state_dict_type(whole, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return whole.state_dict()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train(rank: int, package: str, way: str, order: str) -> dict:
    """Trains the sharded model, and `alone`: the plain model in one process, on the batches of both ranks."""
    warnings.simplefilter("ignore")
    model = make(package).train()
    # No position halts, since ranks that exit the loop at different depths would wait for each other.
    with torch.no_grad():
        model.recurrent.act.halt.weight.mul_(0.1)
        model.recurrent.act.halt.bias.fill_(-8.0)
    alone = copy.deepcopy(model)
    classes = blocks(package)
    if order == "accelerate, then wrap":
        accelerate(model)
    whole = WAYS[way](model, classes)
    if order == "wrap, then accelerate":
        accelerate(whole)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=RATE) for m in (whole, alone))
    losses, gradients = [], 0.0
    for _ in range(STEPS):
        ours.zero_grad()
        theirs.zero_grad()
        loss = loss_of(whole, BATCHES[rank])
        loss.backward()
        dist.all_reduce(loss := loss.detach().clone())
        expected = sum(loss_of(alone, ids) for ids in BATCHES) / 2
        expected.backward()
        losses.append((float(loss) / 2, float(expected)))
        if way != "fsdp1, flat":
            found = full_gradients(whole, way)
            whole_norm = torch.stack([p.grad.norm() for p in alone.parameters() if p.grad is not None]).norm()
            for name, p in alone.named_parameters():
                a = torch.zeros_like(p) if found[name] is None else found[name]
                b = torch.zeros_like(p) if p.grad is None else p.grad
                gradients = max(gradients, float((a - b).norm() / whole_norm))
        ours.step()
        theirs.step()
    held = state(whole, way)
    weights = max(float((held[name] - p).detach().norm() / p.detach().norm()) for name, p in alone.state_dict().items())
    rows = [(row.name, row.kind, row.backend, row.reason) for row in report(whole)]
    return {"losses": losses, "gradients": gradients, "weights": weights, "units": units(whole, way), "rows": rows}


@functools.cache
def trained(package: str, way: str, order: str) -> list[dict]:
    return run_ranks(train, package, way, order)


BEFORE, AFTER = "accelerate, then wrap", "wrap, then accelerate"
# Each case starts two processes; the other cases are slow and run in CI.
QUICK = (("fsdp1, flat", BEFORE), ("fsdp1, original parameters", AFTER), ("fsdp2", BEFORE), ("fsdp2", AFTER))
CASES = [
    pytest.param(
        package, way, order, marks=[] if package == "open_mythos" and (way, order) in QUICK else pytest.mark.slow
    )
    for package in ("open_mythos", "openmythos")
    for way in WAYS
    for order in (BEFORE, AFTER)
]


@pytest.mark.parametrize("package, way, order", CASES)
def test_training_on_two_ranks(upstream, package, way, order):
    for result in trained(package, way, order):
        for loss, expected in result["losses"]:
            assert loss == pytest.approx(expected, rel=1e-5)
        assert result["gradients"] < 5e-5
        assert result["weights"] < 5e-5
        if way != "ddp":
            # the model, prelude and coda, the recurrent block and its transformer block
            assert result["units"] == 1 + 2 + 1 + 1
        names = [name for name, *_ in result["rows"]]
        for part in ("prelude.0", "recurrent", "recurrent.block", "coda.0"):
            assert any(
                part
                == name.replace("_fsdp_wrapped_module.", "")
                .removeprefix("module.")
                .removesuffix("._fsdp_wrapped_module")
                for name in names
            ), (part, names)
        for name, kind, backend, reason in result["rows"]:
            assert reason or backend != "reference", (name, kind)


def test_a_sharded_model_says_what_runs(upstream):
    """FSDP2 gathers weights before a block runs, so our ops run, and the report says so."""
    for _, kind, backend, reason in trained("open_mythos", "fsdp2", BEFORE)[0]["rows"]:
        if kind.endswith(("MLAttention", "MoEFFN")):
            assert backend == "cpu", (kind, reason)
