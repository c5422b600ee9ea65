"""Drop-in mixture-of-experts layer."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

import openmythos.moe
from openmythos.layers import Expert
from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.runtime.backends import Choice, choose

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, "_global" + name) for name in _HOOKS)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MoEFFN(openmythos.moe.MoEFFN):
    """The reference layer with all experts, routed and shared, computed in one op.

    Routing stays the reference's. Weights are read from the experts at every call; when something stands in the
    way of reading them directly (see `backend`), the reference's forward runs.
    """

    def backend(self, x: Optional[Tensor] = None) -> Choice:
        """What this layer runs on, and why not on something faster.

        Args:
            x: the input; without it only what does not depend on an input is judged.
        """
        choice = choose("moe_experts", self.router.weight.device.type)
        if not choice.fast:
            return choice
        reason = self._obstacle(x)
        return Choice("reference", reason) if reason else choice

    def _obstacle(self, x: Optional[Tensor]) -> Optional[str]:
        """Why the op cannot stand in for the reference, or None."""
        weight = self.routed_experts[0].gate.weight
        if weight.dtype not in _DTYPES:
            return f"weights are {weight.dtype}"
        if x is not None:
            if x.device.type != "cpu":
                return f"x is on {x.device}, the kernels need cpu"
            master = weight.dtype == torch.float32 and torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
            if weight.dtype != _compute_dtype(x) and not master:
                return f"x is computed in {_compute_dtype(x)}, weights are {weight.dtype}"
        return _bypassed(self.routed_experts) or _bypassed(self.shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        if not self.backend(x).fast:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        expert_idx, gates = self.route(flat)
        self.record_load(expert_idx)
        out = moe_experts(
            flat.to(_compute_dtype(x)), expert_idx, gates, *_weights(self.routed_experts), *_weights(self.shared_experts)
        )
        return out.to(x.dtype).view_as(x)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast, if on, would cast the input of a linear layer to."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _weights(experts: nn.ModuleList) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The experts' own gate, up and down weights. Plain dict look-ups: attribute access on modules costs ten times more."""
    parts = [expert._modules for expert in experts._modules.values()]
    return tuple([part[name]._parameters["weight"] for part in parts] for name in ("gate", "up", "down"))


def _bypassed(experts: nn.ModuleList) -> Optional[str]:
    """What the op would silently skip by not calling the experts: hooks, replaced or adapted submodules. None if nothing."""
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    for expert in experts._modules.values():
        for module, kind in ((expert, Expert), *((part, nn.Linear) for part in expert._modules.values())):
            state = module.__dict__
            if type(module) is not kind or "forward" in state:
                return f"an expert's {kind.__name__} was replaced by {type(module).__name__}"
            if any(state[hooks] for hooks in _HOOKS):
                return f"hooks are registered on an expert's {kind.__name__}"
            if kind is nn.Linear and state["_parameters"]["bias"] is not None:
                return "an expert's Linear has a bias"
    return None
