"""The processes of a run: one alone, or those that `torchrun` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from openmythos.training.rendezvous import join

Device = Literal["auto", "cpu", "cuda"]


def compute_device(name: Device = "auto") -> torch.device:
    """The device of a name; "auto" is a GPU if there is one, that of this process's LOCAL_RANK.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError('device = "cuda": PyTorch finds no GPU here')
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu and name != "cpu" else torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: of this process. ranks: how many there are.
        device: where this process computes.
        joined: whether `start` has made the process group, so that `end` leaves it.
    """

    rank: int
    ranks: int
    device: torch.device
    joined: bool = False

    @staticmethod
    def start(device: Device = "auto") -> Ranks:
        """Joins the process group that `torchrun` describes in the environment; without one this process is alone.

        Raises:
            ValueError: device "cuda" without a GPU.
        """
        here = compute_device(device)
        if here.type == "cuda":
            torch.cuda.set_device(here)
        if "WORLD_SIZE" not in os.environ:
            return Ranks(0, 1, here)
        joins = not dist.is_initialized()
        if joins:
            join("nccl" if here.type == "cuda" else "gloo")
        return Ranks(dist.get_rank(), dist.get_world_size(), here, joins)

    @property
    def first(self) -> bool:
        """Whether this process writes what one process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.ranks > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> None:
        """Averages `values` over ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
            values /= self.ranks

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.ranks == 1:
            return flag
        found = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(found)
        return bool(found.item())

    def end(self) -> None:
        """Leaves the process group, if `start` made it."""
        if self.joined:
            dist.destroy_process_group()
