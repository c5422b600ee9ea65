"""Guards: when an op may stand in for a module's parts. They must be the reference's own, with nothing hooked on.

An op reads the weights of a part and never calls it: a hook, a subclass or an adapter would be skipped in silence.
A guard judges a part before its weights are read: a replacement may have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

import openmythos
from openmythos import compat
from openmythos.layers import Expert, RMSNorm

# Types of weights that hold their numbers, or stand for them while a graph is made. A product with another type
# (quantized, sharded, ...) is not the product of the numbers that an op would read.
_NUMBERS = {nn.Parameter, Tensor, *compat.STAND_INS}
_DIMENSIONS = {nn.Linear: 2, nn.Embedding: 2, RMSNorm: 1}
# Classes of swapped modules -> what they run.
_RUNS: dict[type, type] = {}
# Classes of the reference -> their drop-in forms.
_FAST: dict[type, type] = {}
# Class -> its public methods. An op that stands in for a part calls none of them.
_METHODS: dict[type, tuple[str, ...]] = {}
# Classes of the reference with replaced methods -> which methods.
_PATCHED: dict[type, str] = {}
# True while sharded weights count as whole, as FSDP makes them when their module runs.
_lent: ContextVar[bool] = ContextVar("lent", default=False)


def stands_for(cls: type, kind: type) -> None:
    """Objects of class `cls` count as plain objects of class `kind` from now on."""
    _RUNS[cls] = kind


def stand_in(fast: type, reference: type) -> None:
    """From now on `is_fast` knows objects of class `fast` as what stands in for `reference`."""
    _FAST[reference] = fast


def is_fast(part: nn.Module | None, reference: type) -> bool:
    """Whether a module runs our drop-in form of the class `reference`."""
    return kind_of(part) is _FAST[reference]


def fast_obstacle(name: str, part: nn.Module | None, reference: type) -> str:
    """Why an op must not stand in for `part`, which should be the drop-in form of `reference`; empty when it may."""
    return obstacle(name, part, _FAST[reference])


def kind_of(part: nn.Module | None) -> type:
    """What a module runs: its class, or the one that a swapped class stands for."""
    cls = type(part)
    return _RUNS.get(cls, cls)


def obstacle(name: str, part: Any, kind: type) -> str:
    """Why an op must not stand in for `part`, which should be a `kind` without bias; empty when it may.

    Reads the module's dict: attribute access on modules is slow, and decoding asks at every token.
    """
    if kind_of(part) is not kind:
        return f"{name} is not a plain {kind.__name__}"
    state = part.__dict__
    if kind in _PATCHED:
        return _PATCHED[kind]
    if reason := own_methods(name, part, kind):
        return reason
    if has_hooks(part):
        return f"{name} has hooks"
    if kind is nn.Linear and state["_parameters"]["bias"] is not None:
        return f"{name} has a bias"
    if (dimensions := _DIMENSIONS.get(kind)) is not None:
        return weight_obstacle(name, state["_parameters"].get("weight"), dimensions)
    return ""


def weight_obstacle(name: str, weight: Any, dimensions: int) -> str:
    """Why an op must not read a weight that should have so many dimensions; empty when it may."""
    if type(weight) in _NUMBERS and weight.dim() == dimensions:
        return ""
    if weight is None:
        return f"{name} has no weight that is a parameter"
    if _lent.get():
        return ""
    if type(weight) not in _NUMBERS:
        return f"the weight of {name} is a {type(weight).__name__}, no plain tensor"
    return f"the weight of {name} has {weight.dim()} dimensions, a shard or a view instead of {dimensions}"


def own_methods(name: str, part: nn.Module, kind: type, called: bool = False) -> str:
    """Why `part`, which is of class `kind`, is not what its class says: a method of it was replaced on the object.

    Args:
        called: whether it is its class' forward that asks. Then a forward of its own has called that, as wrappers do.
    """
    state = part.__dict__
    for method in _METHODS.get(kind, ("forward",)):
        if method in state and not (called and method == "forward"):
            return f"{name} has a {method} of its own"
    return ""


def mark_patched(kind: type, reason: str) -> None:
    """From now on objects of class `kind` are called, as `reason` (empty: none) says that the class itself was
    patched."""
    if reason:
        _PATCHED[kind] = reason
    else:
        _PATCHED.pop(kind, None)


def patched_classes() -> dict[type, str]:
    """The classes that `mark_patched` has marked, and why."""
    return _PATCHED


def watch(*kinds: type) -> None:
    """From now on `own_methods` looks for all methods of these classes, not for `forward` alone."""
    for kind in kinds:
        ours = [cls for cls in kind.__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
        methods = {
            name for cls in ours for name, value in vars(cls).items() if callable(value) and not name.startswith("_")
        }
        _METHODS[kind] = tuple(sorted(methods))


def expert_obstacle(name: str, expert: nn.Module) -> str:
    """The same for a SwiGLU expert and its three linear maps."""
    if reason := obstacle(name, expert, Expert):
        return reason
    for part_name, part in expert._modules.items():
        if reason := obstacle(f"{name}'s {part_name}", part, nn.Linear):
            return reason
    return ""


def halt_obstacle(act: nn.Module) -> str:
    """Why an op must not read the weights of an ACTHalting's linear map."""
    halt = act._modules["halt"]
    if type(halt) is not nn.Linear or "forward" in halt.__dict__ or has_hooks(halt):
        return "act's halt is not a plain Linear"
    weights = halt._parameters
    return weight_obstacle("act's halt", weights.get("weight"), 2) or weight_obstacle(
        "act's halt's bias", weights.get("bias"), 1
    )


def has_hooks(part: nn.Module) -> bool:
    """Whether anything happens when `part` is called that does not when its weights are read."""
    state = part.__dict__  # spelled out: this is asked hundreds of times for every decoded token
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def global_hooks() -> str:
    """The same for hooks set on all modules at once."""
    return "hooks on every module are set" if any(compat.GLOBAL_MODULE_HOOKS) else ""


@contextlib.contextmanager
def lent_whole() -> Iterator[None]:
    """Within, sharded weights are judged as what they are while their module runs, where FSDP lends them whole."""
    token = _lent.set(True)
    try:
        yield
    finally:
        _lent.reset(token)


def takes_causal(core: nn.Module) -> bool:
    """Whether every attention layer in a block, or a stack of them, takes a CausalMask for a tensor."""
    layers = [m._modules["attn"] for m in core.modules() if isinstance(m, openmythos.TransformerBlock)]
    plain: tuple[type, ...] = (openmythos.MLAttention, openmythos.GQAttention)
    return all(is_fast(layer, openmythos.MLAttention) or kind_of(layer) in plain for layer in layers)
