"""`report(model)` says what runs each module that has a fast form, and why nothing faster does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields

import torch.nn as nn

import openmythos
from openmythos_kernels.nn.guards import lent_whole
from openmythos_kernels.swap import SWAPS, original, plain_class, plan

_FAST = tuple(fast_cls for _, fast_cls, _ in SWAPS.values())
_SWITCH = {reference: switch for switch, (reference, _, _) in SWAPS.items()}


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    backend: str
    reason: str


class Report(list):
    """Rows (name, kind, backend, reason); prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no module of openmythos or open_mythos found"
        rows = [tuple(f.name for f in fields(Row)), *(tuple(vars(row).values()) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[3]]).rstrip() for row in rows)


def report(model: nn.Module) -> Report:
    """What runs each attention, MoE and recurrent module, block and model in `model`, and why nothing faster does.

    Modules that FSDP shards are judged as what they are while they run, when it lends them their weights whole. Reads
    no weights of other ranks, so that one rank alone may ask.
    """
    rows = Report()
    plans = plan(model)
    sharded = _sharded(model)
    for name, module in model.named_modules():
        planned, cls = plans[module], plain_class(type(module))
        if isinstance(module, _FAST):
            with lent_whole() if module in sharded else contextlib.nullcontext():
                choice = module.backend()
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
        rows.append(Row(name or "(model)", original(cls).__name__, backend, reason))
    return rows


def _sharded(model: nn.Module) -> set[nn.Module]:
    """The modules below one that FSDP, in either form, shards."""
    tops = [m for m in model.modules() if "_fsdp_wrapped_module" in m._modules or hasattr(m, "_get_fsdp_state")]
    return {module for top in tops for module in top.modules()}
