"""`accelerate(model)` swaps fast modules in, `restore(model)` takes them out.

A swap replaces a module's class and nothing else: the module object, its
parameters, buffers, hooks, configuration and name stay, so optimizers, state_dict,
copies and pickles go on as before and no weight exists twice.

After a swap a model computes what it computed before. A module of which that cannot be
said is left alone, and so is every module of open_mythos around it that would call it in our way
(`openmythos_kernels.report` says why).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch.nn as nn

import openmythos
from openmythos.injection import LTIInjection, ParcaeInjection, ResidualInjection
from openmythos_kernels import nn as fast
from openmythos_kernels.nn.guards import mark_patched, own_methods
from openmythos_kernels.runtime import backends
from openmythos_kernels.runtime.huge_pages import use_huge_pages
from openmythos_kernels.upstream import judge, patched
from openmythos_kernels.upstream.swapped_class import SwappedClass, swapped_class

# switch -> (reference class, fast class, the op it lives on)
SWAPS = {
    "attention": (openmythos.MLAttention, fast.MLAttention, "mla_decode"),
    "moe": (openmythos.MoEFFN, fast.MoEFFN, "moe_experts"),
    "loop": (openmythos.RecurrentBlock, fast.RecurrentBlock, "loop_step"),
    "block": (openmythos.TransformerBlock, fast.TransformerBlock, "rms_norm"),
    "graph": (openmythos.OpenMythos, fast.OpenMythos, "mla_decode"),
}
_FAST: dict[type, tuple[str, type]] = {
    reference: (switch, fast_cls) for switch, (reference, fast_cls, _) in SWAPS.items()
}
_REFERENCE: dict[type, type] = {fast_cls: reference for reference, (_, fast_cls) in _FAST.items()}
# A model of open-mythos is first read as ours: same parameters and attributes, class by class.
_OURS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        openmythos.OpenMythos,
        openmythos.TransformerBlock,
        openmythos.RecurrentBlock,
        openmythos.MLAttention,
        openmythos.GQAttention,
        openmythos.MoEFFN,
        openmythos.Expert,
        openmythos.RMSNorm,
        openmythos.LoRAAdapter,
        openmythos.ACTHalting,
        LTIInjection,
    )
}
# Further classes whose weights ops read without calling them.
_READ = (ResidualInjection, ParcaeInjection)
# Parts that ours calls in another way than open-mythos does (a causal mask that is no tensor, an update in steps).
_CALLED_OUR_WAY = {
    "OpenMythos": ("prelude", "recurrent", "coda"),
    "RecurrentBlock": ("block", "injection"),
    "TransformerBlock": ("attn",),
}
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
IDLE_EXPERTS = ("zeros", "none")


@dataclass(frozen=True)
class Plan:
    """What becomes of one module.

    Attributes:
        target: the class that it should have.
        reason: why it is left as it is, though it has, or is meant to have, a class that could be swapped; else empty.
        around: whether it is so for a part of it that is left.
    """

    target: type
    reason: str = ""
    around: bool = False


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    moe: bool = True,
    loop: bool = True,
    block: bool = True,
    graph: bool = True,
    backend: str = "auto",
    idle_experts: str = "zeros",
) -> nn.Module:
    """Swaps fast modules in, in place, and on a CPU puts the weights into huge pages (`use_huge_pages`).

    Args:
        model: built from `openmythos` or from `open_mythos`; any module that holds their modules will do.
        attention, moe, loop, block, graph: which families to swap. `block` covers norms, residual additions and dense
            FFNs; `graph` lets `generate` replay a token's work as a CUDA graph on a GPU. Calling again with other
            switches changes them.
        backend: "auto" takes the fastest that can run and falls back to the reference; a name
            (see `openmythos_kernels.runtime.backends`) insists on it.
        idle_experts: what the weights of routed experts without a token get in a backward pass. "zeros" gives gradients
            of zeros, which data-parallel training needs, as ranks must agree on what has a gradient; an optimizer's
            momentum and weight decay then move them. "none" leaves `.grad` as it is, as open_mythos does; it costs the
            summing of gradients over loops in place, and on a GPU the host waits for the device once a call.

    Returns:
        The same model. One warning counts the modules that were left alone; `report(model)` says why each was.

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
    if idle_experts not in IDLE_EXPERTS:
        raise ValueError(f"idle_experts = {idle_experts!r}: must be one of {', '.join(IDLE_EXPERTS)}")
    plans = plan(model, switches)
    _check_backends(model, plans, backend)
    for module, planned in plans.items():
        _become(module, planned.target)
        if isinstance(module, openmythos.MoEFFN) and idle_experts != module.idle_experts:
            module.idle_experts = idle_experts
    use_huge_pages(model.parameters())
    _warn_of_the_rest(model, plans)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` exactly, in place; returns the model."""
    for module in model.modules():
        if isinstance(module, openmythos.MoEFFN):
            module.__dict__.pop("idle_experts", None)
        _become(module, original(type(module)))
    return model


def plan(model: nn.Module, switches: dict[str, bool] | None = None) -> dict[nn.Module, Plan]:
    """What `accelerate` would make of every module; None: of all families."""
    switches = switches or dict.fromkeys(SWAPS, True)
    judged: dict[type, tuple[str, str]] = {cls: _judged(cls) for cls in _OURS.values()}
    for cls in (*judged, *_READ):
        mark_patched(cls, judged[cls][1] if cls in judged else patched(cls))
    plans: dict[nn.Module, Plan] = {}
    for module in reversed(list(model.modules())):  # parts before what they are part of
        cls = original(type(module))
        if cls not in judged:
            judged[cls] = _judged(cls)
        plans[module] = _planned(module, cls, *judged[cls], switches, plans)
    return dict(reversed(plans.items()))


def _judged(cls: type) -> tuple[str, str]:
    """The name of the reference class that `cls` is or derives from, and why it must not be swapped; empty: see
    `Judgement`."""
    if cls in _OURS.values():
        return cls.__name__, patched(cls)
    ours = next((base for base in cls.__mro__[1:] if base in _FAST), None)
    if ours is not None:
        return ours.__name__, f"{cls.__name__} is a subclass of {ours.__name__}: its own code is left alone"
    judgement = judge(cls)
    return judgement.name, judgement.reason


def _planned(module: nn.Module, cls: type, name: str, reason: str, switches: dict[str, bool], plans: dict) -> Plan:
    """The plan for a module whose parts have theirs."""
    if not name:
        return Plan(plain_class(type(module)))
    reference = _OURS[name]
    upstream = cls is not reference
    reason = reason or own_methods("this module", module, reference)
    if upstream and not reason:
        reason = _unknown_fields(module)
    if reason:
        return Plan(cls, reason)
    if upstream and (part := _left_part(module, name, plans)):
        return Plan(cls, part, around=True)
    switch, fast_cls = _FAST.get(reference, ("", reference))
    ours = fast_cls if switches.get(switch, True) else reference
    return Plan(swapped_class(ours, cls) if upstream else ours)


def _unknown_fields(module: nn.Module) -> str:
    """Fields that a module's configuration has and open_mythos' has not; empty when there are none."""
    cfg = module.__dict__.get("cfg")
    if cfg is not None and (unknown := sorted(vars(cfg).keys() - _FIELDS)):
        return f"its configuration has fields that open_mythos' has not: {', '.join(unknown)}"
    return ""


_FIELDS = {field.name for field in fields(openmythos.MythosConfig)}


def _left_part(module: nn.Module, name: str, plans: dict[nn.Module, Plan]) -> str:
    """A part that is left alone and that ours would call in another way than open_mythos does; empty if there is
    none."""
    for part_name, part in _parts_called_our_way(module, name):
        inner = _unwrapped(part)
        if not issubclass(plans[inner].target, tuple(_OURS.values())):
            return f"its {part_name} is left as it is"
    return ""


def _parts_called_our_way(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for part_name in _CALLED_OUR_WAY.get(name, ()):
        part: Any = module._modules[part_name]
        if type(part) is nn.ModuleList:
            yield from ((f"{part_name}.{i}", each) for i, each in part._modules.items())
        else:
            yield part_name, part


def _unwrapped(module: nn.Module) -> nn.Module:
    """What wrappers that pass on their arguments hold."""
    while type(module).__module__.startswith("torch."):
        inner = next((module._modules[name] for name in _WRAPPERS if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def plain_class(cls: type) -> type:
    """`cls` without what `fully_shard` and its like put around it: a class of theirs and the module's own as bases."""
    bases = cls.__bases__
    mixed = (
        len(bases) == 2
        and bases[0].__module__.startswith("torch.distributed")
        and cls.__module__ != bases[1].__module__
    )
    return bases[1] if mixed else cls


def original(cls: type) -> type:
    """The class that a module of class `cls` had before it was swapped."""
    cls = plain_class(cls)
    return cls.replaces if type(cls) is SwappedClass else _REFERENCE.get(cls, cls)


def _become(module: nn.Module, target: type) -> None:
    """Gives a module its class, within what `fully_shard` put around it."""
    cls: Any = type(module)
    inner = plain_class(cls)
    if inner is not target:
        module.__class__ = target if inner is cls else _around(cls, target)


@functools.cache
def _around(cls: type, target: type) -> type:
    """The class that `fully_shard` would have made of `target`, as it made `cls`."""
    body = {
        name: value
        for name, value in vars(cls).items()
        if name not in ("__module__", "__doc__", "__dict__", "__weakref__")
    }
    return type(cls)(f"FSDP{target.__name__}", (cls.__bases__[0], target), body)


def _check_backends(model: nn.Module, plans: dict[nn.Module, Plan], backend: str) -> None:
    """A named backend must be able to run; an automatic choice that falls back says so, once for all ops."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    runs = [planned.target for planned in plans.values()]
    wanted = {op for _, fast_cls, op in SWAPS.values() if any(issubclass(target, fast_cls) for target in runs)}
    slow: dict[str, list[str]] = {}
    for op in sorted(wanted):
        if backend != "auto":
            backends.require(op, backend, device)
        elif not (choice := backends.choose(op, device)).fast:
            slow.setdefault(choice.reason, []).append(op)
    for reason, ops in slow.items():
        verb = "runs" if len(ops) == 1 else "run"
        warnings.warn(f"openmythos_kernels: {', '.join(ops)} {verb} on the reference: {reason}", stacklevel=3)
    if backend != "auto" and not wanted:
        backends.require(next(iter(backends.OPS)), backend, device)


def _warn_of_the_rest(model: nn.Module, plans: dict[nn.Module, Plan]) -> None:
    """One warning that counts the modules left alone, or says that nothing was found."""
    left = [planned for planned in plans.values() if planned.reason]
    if left:
        causes = [planned.reason for planned in left if not planned.around]
        shown = "; ".join(list(dict.fromkeys(causes))[:3])
        around = f", and {len(left) - len(causes)} around them" if len(left) > len(causes) else ""
        swapped = sum(issubclass(planned.target, tuple(_REFERENCE)) for planned in plans.values())
        warnings.warn(
            f"openmythos_kernels: modules left as they are: {len(causes)} ({shown}){around}; swapped: {swapped}. "
            "report(model) says why for each",
            stacklevel=3,
        )
    elif not any(original(type(module)) in _OURS.values() or judge(original(type(module))).name for module in plans):
        warnings.warn(
            f"openmythos_kernels: nothing was swapped: {type(model).__name__} has no module of openmythos "
            "or open_mythos",
            stacklevel=3,
        )
