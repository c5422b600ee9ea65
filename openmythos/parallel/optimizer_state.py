"""An optimizer's state by the names of its parameters, which any number of ranks can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from openmythos.parallel.plan import ranks
from openmythos.training.checkpoint_optimizers import parameter_names

OPTIMIZER = "optimizer."


class Layout(NamedTuple):
    """What an optimizer's state stands for: its class and, per group, the names of parameters."""

    kind: str
    groups: list[list[str]]

    def on_all_ranks(self) -> Layout:
        """The same with the parameters that other ranks hold."""
        if ranks() == 1:
            return self
        each: list[Any] = [None] * ranks()
        dist.all_gather_object(each, self.groups)
        return Layout(self.kind, [sorted({n for groups in each for n in groups[i]}) for i in range(len(self.groups))])


def matched(path: Path, layout: Layout, saved: dict | None, saved_settings: list[dict]) -> list[dict]:
    """A checkpoint's settings for each group of an optimizer.

    Groups may be divided in another way (see `split_groups`), as long as a group's parameters had the same settings.

    Raises:
        ValueError: the checkpoint's optimizer is another one.
    """
    if saved is None:
        raise ValueError(f"{path}: optimizer: the checkpoint holds no state of one, expected that of {layout.kind}")
    if saved["kind"] != layout.kind:
        raise ValueError(f"{path}: optimizer: state of {saved['kind']}, expected that of {layout.kind}")
    group_of = {name: i for i, group in enumerate(saved["groups"]) for name in group}
    found = []
    for i, group in enumerate(layout.groups):
        if unknown := [name for name in group if name not in group_of]:
            raise ValueError(
                f"{path}: optimizer: holds no state of {unknown[0]}, expected that of the optimizer's group {i}"
            )
        theirs = [saved_settings[number] for number in sorted({group_of[name] for name in group})]
        if any(repr(one) != repr(theirs[0]) for one in theirs):
            raise ValueError(f"{path}: optimizer: parameters of group {i} had different settings, expected the same")
        found.append(theirs[0])
    return found


def layout_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Layout:
    return Layout(type(optimizer).__name__, parameter_names(optimizer, model))


def held(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """`optimizer.NAME/QUANTITY` -> tensor or number."""
    names = _names(model)
    return {
        f"{OPTIMIZER}{names[id(p)]}/{quantity}": value.detach() if isinstance(value, Tensor) else value
        for p, quantities in optimizer.state.items()
        for quantity, value in quantities.items()
    }


def allocated(model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
    """Room for the state of this rank's parameters, as a checkpoint's metadata describe it: like the parameter where
    it has its shape, whole elsewhere."""
    room: dict[str, Any] = {}
    parameters = dict(model.named_parameters())
    for key, about in stored.items():
        name = key.removeprefix(OPTIMIZER).rpartition("/")[0]
        p = parameters.get(name)
        if p is None:
            continue  # another rank's
        if not isinstance(about, TensorStorageMetadata):
            room[key] = None
        elif about.size == p.shape:
            room[key] = torch.zeros_like(p, dtype=about.properties.dtype).detach()
        else:
            room[key] = torch.zeros(about.size, dtype=about.properties.dtype)
    return room


def settings(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The groups' settings: learning rate, decay, ..."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def take(optimizer: torch.optim.Optimizer, model: nn.Module, settings: list[dict], state: dict[str, Any]) -> None:
    """Gives an optimizer the settings of its groups, and its parameters their state, as `allocated` named it."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key.startswith(OPTIMIZER):
            name, _, quantity = key.removeprefix(OPTIMIZER).rpartition("/")
            by_name.setdefault(name, {})[quantity] = value
    names = _names(model)
    optimizer.state.clear()
    for group, new in zip(optimizer.param_groups, settings):
        group.update(new)
        on_device = group.get("capturable") or group.get("fused")  # where such an optimizer counts its steps
        for p in group["params"]:
            quantities = by_name.get(names[id(p)], {})
            if on_device and isinstance(quantities.get("step"), Tensor):
                quantities["step"] = quantities["step"].to(p.device)
            if quantities:
                optimizer.state[p] = quantities


def _names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}
