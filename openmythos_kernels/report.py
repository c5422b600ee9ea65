"""`report(model)` says what runs each module that has a fast form, and why nothing faster does."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

import openmythos
from openmythos import compat
from openmythos_kernels.nn import paths
from openmythos_kernels.nn.guards import lent_whole
from openmythos_kernels.swap import SWAPS, original, plain_class, plan

_FAST: tuple[Any, ...] = tuple(fast_cls for _, fast_cls, _ in SWAPS.values())
_SWITCH = {reference: switch for switch, (reference, _, _) in SWAPS.items()}


@dataclass(frozen=True)
class PathRow:
    """One way through a module.

    Attributes:
        name: of the file in `openmythos_kernels/nn/paths`.
        backend: what it runs on; "reference" where this module cannot take it.
        reason: why it cannot, or why its backend is not a faster one; else empty.
        when: the calls it takes.
        runs: how often it ran; None where the model was not run.
    """

    name: str
    backend: str
    reason: str
    when: str
    runs: int | None = None

    def __str__(self) -> str:
        mark = f"> ran {self.runs}x" if self.runs else ""
        refuses = self.backend == "reference" and self.reason
        return f"{mark:<9} {self.name:<14} {f'refuses: {self.reason}' if refuses else self.when}"


@dataclass(frozen=True)
class Row:
    """One module: what runs it, and why nothing faster does; its paths, fastest first."""

    name: str
    kind: str
    backend: str
    reason: str
    paths: tuple[PathRow, ...] = ()


class Report(list):
    """Rows; prints as a table, each module's paths below it, or the module before it that has the same."""

    def __str__(self) -> str:
        if not self:
            return "no module of openmythos or open_mythos found"
        table = [("name", "kind", "backend", "reason"), *((r.name, r.kind, r.backend, r.reason) for r in self)]
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[3]]).rstrip() for line in table]
        shown = lines[:1]
        first: dict[tuple[PathRow, ...], str] = {}
        for row, line in zip(self, lines[1:]):
            shown.append(line)
            listed = first.setdefault(row.paths, row.name)
            shown += [f"  {path}" for path in row.paths] if listed == row.name else [f"  as {listed}"]
        return "\n".join(shown)


def report(model: nn.Module, input_ids: Tensor | None = None) -> Report:
    """What runs each attention, MoE and recurrent module, block and model in `model`, and why nothing faster does.

    Modules that FSDP shards are judged as what they are while they run, when it lends them their weights whole. Without
    `input_ids` this reads no weights of other ranks, so that one rank alone may ask.

    Args:
        model: any module.
        input_ids: (B, T) token ids. With them the model is called once, `model(input_ids)` in its present mode and with
            gradients if they are on, and each path says how often it ran.

    Returns:
        One row for each module. `print` shows a module's list of paths below it: which calls each takes, or why it
        refuses all calls of this module.
    """
    ran = None if input_ids is None else _ran(model, input_ids)
    rows = Report()
    plans = plan(model)
    sharded = _sharded(model)
    for name, module in model.named_modules():
        planned, cls = plans[module], plain_class(type(module))
        listed: tuple[PathRow, ...] = ()
        if isinstance(module, _FAST):
            with lent_whole() if module in sharded else contextlib.nullcontext():
                choice = module.backend()
                listed = tuple(_path(module, path, ran) for path in _paths_of(module))
            backend, reason = choice.backend, choice.reason
            if planned.reason:  # what the class was when it was swapped
                reason = f"since accelerate: {planned.reason}, which this module does not run; restore(model) lets it"
        elif planned.reason:
            backend, reason = "reference", planned.reason
        elif isinstance(module, openmythos.GQAttention) or issubclass(planned.target, openmythos.GQAttention):
            backend, reason = "reference", "grouped-query attention is left to PyTorch"
        elif switch := next((s for reference, s in _SWITCH.items() if issubclass(planned.target, reference)), ""):
            backend, reason = "reference", f"not swapped: accelerate(model, {switch}=True) would"
        else:
            continue
        rows.append(Row(name or "(model)", original(cls).__name__, backend, reason, listed))
    return rows


def _paths_of(module: Any) -> tuple:
    """A module's paths: a decoder's first, those inside a loop behind the loops'; the reference once, at the end."""
    lists = (getattr(module, name, ()) for name in ("decoder_paths", "paths", "step_paths", "enter_paths"))
    listed = itertools.chain(*lists)
    return (*(path for path in listed if path is not paths.reference), paths.reference)


def _path(module: nn.Module, path, ran: Counter | None) -> PathRow:
    choice, name = path.choice(module), path.__name__.rpartition(".")[2]
    runs = None if ran is None else ran[module, path]
    return PathRow(name, choice.backend, choice.reason, path.WHEN, runs)


def _ran(model: nn.Module, input_ids: Tensor) -> Counter:
    """How often each path of each module runs in one call of the model."""
    ran: Counter = Counter()
    before, paths.listener = paths.listener, lambda module, path: ran.update([(module, path)])
    try:
        model(input_ids)
    finally:
        paths.listener = before
    return ran


def _sharded(model: nn.Module) -> set[nn.Module]:
    """The modules below one that FSDP, in either form, shards."""
    return {module for top in model.modules() if compat.is_fsdp(top) for module in top.modules()}
