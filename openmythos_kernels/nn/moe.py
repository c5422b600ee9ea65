"""Drop-in mixture-of-experts layer."""

from __future__ import annotations

from typing import Iterable, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

import openmythos.moe
from openmythos.layers import Expert
from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.runtime import extension

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, "_global" + name) for name in _HOOKS)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MoEFFN(openmythos.moe.MoEFFN):
    """The reference layer with all experts, routed and shared, computed in one op.

    Routing stays the reference's. Weights are read from the experts at every call; when something stands in the
    way of reading them directly (see `backend`), the reference's forward runs.
    """

    def backend(self, x: Optional[Tensor] = None) -> tuple[str, str]:
        """Which implementation would run: ("cpu extension" | "reference", why).

        Args:
            x: the input; without it only what does not depend on an input is judged.
        """
        reason = self._bypassed() or self._obstacle(x)
        return ("reference", reason) if reason else ("cpu extension", "compiled kernels are loaded")

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        few = _is_few(x.numel() // x.shape[-1] * self.topk, self.n_experts)
        if not few and self._bypassed() or self._obstacle(x):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        expert_idx, gates = self.route(flat)
        routed, shared = list(self.routed_experts._modules.values()), self.shared_experts._modules.values()
        local_idx = expert_idx
        if few:
            local_idx, routed = _used(expert_idx, routed)
            if _bypassed(routed) or _bypassed(shared):
                return super().forward(x)
        self.record_load(expert_idx)
        out = moe_experts(flat.to(_compute_dtype(x)), local_idx, gates, *_weights(routed), *_weights(shared))
        return out.to(x.dtype).view_as(x)

    def _obstacle(self, x: Optional[Tensor]) -> Optional[str]:
        """Why the op cannot run on these dtypes and devices, or None."""
        if extension.module is None:
            return extension.reason
        weight = self.router.weight
        if weight.device.type != "cpu":
            return f"weights are on {weight.device}, the kernels need cpu"
        if weight.dtype not in _DTYPES:
            return f"weights are {weight.dtype}"
        if x is not None:
            if x.device.type != "cpu":
                return f"x is on {x.device}, the kernels need cpu"
            compute = _compute_dtype(x)
            master = weight.dtype == torch.float32 and compute in (torch.bfloat16, torch.float16) and compute != x.dtype
            if weight.dtype != compute and not master:
                return f"x is computed in {compute}, weights are {weight.dtype}"
        return None

    def _bypassed(self) -> Optional[str]:
        return _bypassed(self.routed_experts._modules.values()) or _bypassed(self.shared_experts._modules.values())


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype autocast, if on, would cast the input of a linear layer to."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _is_few(pairs: int, experts: int) -> bool:
    """Whether to look at the chosen indices on the host and touch only the used experts.

    It saves decoding most of its Python time; a graph must not depend on data, so compilers see all experts.
    """
    return pairs < experts and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _used(expert_idx: Tensor, experts: list[nn.Module]) -> tuple[Tensor, list[nn.Module]]:
    """expert_idx counted among the chosen experts, and these in their order: the op's result is the same to the bit."""
    chosen = expert_idx.flatten().tolist()
    used = sorted(set(chosen)) or [0]  # the op wants at least one expert, even for no token
    position = {e: i for i, e in enumerate(used)}
    local_idx = torch.tensor([position[e] for e in chosen], dtype=torch.int64).view_as(expert_idx)
    return local_idx, [experts[e] for e in used]


def _weights(experts: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The experts' own gate, up and down weights. Plain dict look-ups: attribute access on modules is far slower."""
    parts = [expert._modules for expert in experts]
    return tuple([part[name]._parameters["weight"] for part in parts] for name in ("gate", "up", "down"))


def _bypassed(experts: Iterable[nn.Module]) -> Optional[str]:
    """What the op would silently skip by not calling the experts: hooks, replaced or adapted parts. None if nothing."""
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    for expert in experts:
        for module, kind in ((expert, Expert), *((part, nn.Linear) for part in expert._modules.values())):
            state = module.__dict__
            if type(module) is not kind or "forward" in state:
                return f"an expert's {kind.__name__} was replaced by {type(module).__name__}"
            for hooks in _HOOKS:
                if state[hooks]:
                    return f"hooks are registered on an expert's {kind.__name__}"
            if kind is nn.Linear and state["_parameters"]["bias"] is not None:
                return "an expert's Linear has a bias"
    return None
