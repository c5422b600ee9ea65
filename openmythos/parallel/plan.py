"""How many ranks do what: the sizes of the mesh dimensions, and the meshes made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openmythos.config import checked_integer


@dataclass(frozen=True)
class Plan:
    """How a model is divided over `data * shard` ranks. Every rank computes a batch of its own.

    Attributes:
        data: copies of the model's state; None: as many as there are ranks for.
        shard: ranks that divide one copy of it (FSDP2). 1: every rank holds all of it (DDP).
        expert: ranks that divide the routed experts of each layer. They are ranks that `data` and `shard` count
            already: neighbours, each with E / expert experts. Each expert has data * shard / expert copies.

    Raises:
        ValueError: a size is no integer >= 1.
    """

    data: int | None = None
    shard: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "shard", "expert"):
            if getattr(self, name) is not None or name != "data":
                checked_integer(f"Plan.{name}", getattr(self, name), 1)

    def over(self, ranks: int) -> Plan:
        """The plan with `data` as a number.

        Raises:
            ValueError: if it does not fit this number of ranks.
        """
        data = ranks // self.shard if self.data is None else self.data
        if data * self.shard != ranks:
            raise ValueError(f"{self}: data * shard must be the number of ranks, {ranks}")
        if ranks % self.expert:
            raise ValueError(f"{self}: expert must divide the number of ranks, {ranks}")
        return Plan(data, self.shard, self.expert)


class Meshes(NamedTuple):
    """The same ranks, arranged twice.

    Attributes:
        rest: what `fully_shard` takes, of dimensions "data" and "shard" or "shard" alone; None without sharding.
        experts: of dimensions "copies" and "expert"; None if every rank holds all experts.
    """

    rest: DeviceMesh | None
    experts: DeviceMesh | None

    @staticmethod
    def of(plan: Plan, device: str) -> Meshes:
        """The meshes of a plan `over` all ranks; every rank must call it. Process groups are made here."""
        ranks, rest, experts = dist.get_world_size(), None, None
        if plan.shard > 1:
            rest = init_device_mesh(device, (ranks // plan.shard, plan.shard), mesh_dim_names=("data", "shard"))
            rest = rest["shard"] if plan.shard == ranks else rest
        if plan.expert > 1:
            shape = ranks // plan.expert, plan.expert
            experts = init_device_mesh(device, shape, mesh_dim_names=("copies", "expert"))
        return Meshes(rest, experts)


def ranks() -> int:
    """The number of ranks; 1 where torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
