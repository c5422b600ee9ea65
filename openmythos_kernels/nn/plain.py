"""When an op may stand in for a module's parts: they are the reference's own, and nothing is hooked onto them.

An op reads a part's weights and never calls it, so a hook, a subclass or an adapter there would be skipped in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from openmythos.layers import Expert

_GLOBAL_HOOKS = tuple(
    getattr(torch_module, "_global" + name)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)


def obstacle(name: str, part: nn.Module, kind: type) -> str:
    """Why an op must not stand in for `part`, which should be a `kind` without bias; empty when it may.

    Looks into the module's dict, as attribute access on modules is slow and decoding asks at every token.
    """
    state = part.__dict__
    if type(part) is not kind or "forward" in state:
        return f"{name} is not a plain {kind.__name__}"
    if has_hooks(part):
        return f"{name} has hooks"
    if kind is nn.Linear and state["_parameters"]["bias"] is not None:
        return f"{name} has a bias"
    return ""


def expert_obstacle(name: str, expert: nn.Module) -> str:
    """The same for a SwiGLU expert and its three linear maps."""
    if reason := obstacle(name, expert, Expert):
        return reason
    for part_name, part in expert._modules.items():
        if reason := obstacle(f"{name}'s {part_name}", part, nn.Linear):
            return reason
    return ""


def has_hooks(part: nn.Module) -> bool:
    """Whether anything happens when `part` is called that does not when its weights are read."""
    state = part.__dict__  # spelled out: this is asked hundreds of times for every decoded token
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    )


def global_hooks() -> str:
    """The same for hooks set on all modules at once."""
    return "hooks on every module are set" if any(_GLOBAL_HOOKS) else ""


def packs_saved() -> bool:
    """Whether what is saved for the backward goes through hooks. Under activation checkpointing the forward is then run
    again, and must save the same."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast, if on, would cast the input of a linear layer to."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
