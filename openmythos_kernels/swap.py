"""`accelerate(model)` swaps fast modules in, `restore(model)` takes them out, `report(model)` says what runs.

A swap replaces a module's class and nothing else: the module object, its
parameters, buffers, hooks and name stay, so optimizers, state_dict, copies and
pickles go on as before and no weight exists twice.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional

import torch.nn as nn

import openmythos
from openmythos.config import MythosConfig
from openmythos.injection import LTIInjection
from openmythos_kernels import nn as fast
from openmythos_kernels.nn.plain import has_hooks
from openmythos_kernels.runtime import backends
from openmythos_kernels.runtime.huge_pages import use_huge_pages

# switch -> (reference class, fast class, the op it lives on)
_SWAPS = {
    "attention": (openmythos.MLAttention, fast.MLAttention, "mla_decode"),
    "moe": (openmythos.MoEFFN, fast.MoEFFN, "moe_experts"),
    "loop": (openmythos.RecurrentBlock, fast.RecurrentBlock, "loop_step"),
    "block": (openmythos.TransformerBlock, fast.TransformerBlock, "rms_norm"),
    "graph": (openmythos.OpenMythos, fast.OpenMythos, "mla_decode"),
}
# A model of open-mythos is first read as ours: same parameters and attributes, class by class.
_UPSTREAM_FILE = "open_mythos/main.py"
_UPSTREAM = {
    cls.__name__: cls
    for cls in (
        openmythos.OpenMythos, openmythos.TransformerBlock, openmythos.RecurrentBlock, openmythos.MLAttention,
        openmythos.GQAttention, openmythos.MoEFFN, openmythos.Expert, openmythos.RMSNorm, openmythos.LoRAAdapter,
        openmythos.ACTHalting, LTIInjection,
    )
}  # fmt: skip
_KEPT = "_swapped_from"
# open-mythos calls these parts, the reference reads their weights: hooks on them keep the module as it is.
_READ_NOT_CALLED = {"LoRAAdapter": "scale", "ACTHalting": "halt"}


@dataclass
class Original:
    """What `restore` puts back: the module's class and, for upstream's modules, their configuration object."""

    cls: type
    cfg: Any = None


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    moe: bool = True,
    loop: bool = True,
    block: bool = True,
    graph: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """Swaps fast modules in, in place, and on a CPU puts the weights into huge pages (`use_huge_pages`).

    Args:
        model: built from `openmythos` or from `open_mythos`; any module that holds their modules will do.
        attention, moe, loop, block (norms, residual additions, dense FFNs), graph (on a GPU, `generate` replays a token's
            work as a CUDA graph): which families to swap. Calling again with other switches changes them.
        backend: "auto" takes the fastest that can run and falls back to the reference; a name
            (see `openmythos_kernels.runtime.backends`) insists on it.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: for a bad argument; RuntimeError: if the named backend cannot run.
            Nothing has been swapped then.
    """
    switches = {"attention": attention, "moe": moe, "loop": loop, "block": block, "graph": graph}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, must be a torch.nn.Module")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}: must be True or False")
    configs: dict[int, MythosConfig] = {}  # modules that share a configuration go on sharing it
    plan = [(module, *_target(module, switches, configs)) for module in model.modules()]
    _check_backends(model, plan, backend)
    for module, target, cfg in plan:
        _set(module, target, cfg)
    use_huge_pages(model.parameters())
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` exactly, in place; returns the model."""
    for module in model.modules():
        original = module.__dict__.get(_KEPT)
        if original is not None:
            _set(module, original.cls, original.cfg)
    return model


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
    """What runs each attention, MoE and recurrent module of the model, and why nothing faster does."""
    rows = Report()
    for name, module in model.named_modules():
        if isinstance(module, tuple(fast_cls for _, fast_cls, _ in _SWAPS.values())):
            choice = module.backend()
            rows.append(Row(name or "(model)", type(module).__name__, choice.backend, choice.reason))
        elif (reason := _why_not(module)) is not None:
            rows.append(Row(name or "(model)", type(module).__name__, "reference", reason))
    return rows


def _target(module: nn.Module, switches: dict[str, bool], configs: dict) -> tuple[type, Optional[MythosConfig]]:
    """The class this module should have, and the configuration object if it must change with it."""
    original = module.__dict__.get(_KEPT)
    cls = original.cls if original else type(module)
    if "forward" in module.__dict__:
        return type(module), None  # somebody put their own forward on this very module
    cfg = None
    if _from_upstream(cls):
        part = _READ_NOT_CALLED.get(cls.__name__)
        if part and has_hooks(getattr(module, part)):
            return cls, None
        if isinstance(getattr(module, "cfg", None), MythosConfig):
            cfg = module.cfg  # already ours
        elif hasattr(module, "cfg"):
            cfg = configs.setdefault(id(module.cfg), MythosConfig(**asdict(module.cfg)))
        cls = _UPSTREAM[cls.__name__]
    for switch, (reference, fast_cls, _) in _SWAPS.items():
        if cls is reference and switches[switch]:
            return fast_cls, cfg
    return cls, cfg


def _set(module: nn.Module, target: type, cfg: Any) -> None:
    """Gives a module its class (and configuration), remembering what it had when it was untouched."""
    if type(module) is target:
        return
    original = module.__dict__.get(_KEPT) or Original(type(module), module.__dict__.get("cfg") if cfg is not None else None)
    module.__class__ = target
    if cfg is not None:
        module.cfg = cfg
    if target is original.cls:
        module.__dict__.pop(_KEPT, None)
    else:
        module.__dict__[_KEPT] = original


def _check_backends(model: nn.Module, plan, backend: str) -> None:
    """A named backend must be able to run; an automatic choice that falls back says so."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    wanted = {op for _, fast_cls, op in _SWAPS.values() if any(target is fast_cls for _, target, _ in plan)}
    for op in sorted(wanted):
        if backend != "auto":
            backends.require(op, backend, device)
        elif not (choice := backends.choose(op, device)).fast:
            warnings.warn(f"openmythos_kernels: {op} runs on the reference: {choice.reason}", stacklevel=3)
    if backend != "auto" and not wanted:
        backends.require(next(iter(backends.OPS)), backend, device)


def _from_upstream(cls: type) -> bool:
    """Whether a class is open-mythos' own, however its main.py was loaded."""
    if cls.__name__ not in _UPSTREAM or "forward" not in cls.__dict__:
        return False
    return cls.forward.__code__.co_filename.replace("\\", "/").endswith(_UPSTREAM_FILE)


def _why_not(module: nn.Module) -> Optional[str]:
    """Why a module that could have a fast form runs as it is; None for all other modules."""
    if isinstance(module, openmythos.GQAttention):
        return "grouped-query attention is left to PyTorch"
    for switch, (reference, _, _) in _SWAPS.items():
        upstream = _from_upstream(type(module)) and _UPSTREAM[type(module).__name__] is reference
        if type(module) is reference or upstream:
            if "forward" in module.__dict__:
                return "this module has a forward of its own"
            return f"not swapped: accelerate(model, {switch}=True) would"
        if isinstance(module, reference):
            return f"{type(module).__name__} is a subclass of {reference.__name__}: its own code is left alone"
    return None
