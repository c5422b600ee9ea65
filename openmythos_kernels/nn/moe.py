"""Drop-in mixture-of-experts layer."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Iterable, Iterator, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import openmythos
from openmythos_kernels.nn.plain import compute_dtype, expert_obstacle, global_hooks, has_hooks, packs_saved
from openmythos_kernels.ops.moe import DTYPES, RepeatedExperts, moe_experts, moe_route
from openmythos_kernels.runtime.backends import Choice, choose, forced


class MoEFFN(openmythos.MoEFFN):
    """The reference layer in two ops: routing, and all experts, routed and shared.

    Weights are read from the experts at every call; when something stands in the
    way of reading them directly (see `backend`), the reference's forward runs.
    """

    def repeated(self) -> RepeatedExperts:
        """Its experts, for several calls of one forward; on a GPU autocast's rounding is done here, once."""
        parts = (self.routed_experts._modules.values(), self.shared_experts._modules.values())
        weight = self.router.weight
        dtype = compute_dtype(weight) if weight.is_cuda and weight.dtype == torch.float32 else None
        return RepeatedExperts([weights for part in parts for weights in expert_weights(part)], dtype)

    def backend(self, x: Optional[Tensor] = None) -> Choice:
        """What this layer runs on, and why not on something faster.

        Args:
            x: the input; without it only the module itself is judged.
        """
        experts = [*self.routed_experts._modules.values(), *self.shared_experts._modules.values()]
        return self._backend(x, experts)

    def _backend(self, x: Optional[Tensor], experts: Iterable[nn.Module]) -> Choice:
        choice = choose("moe_experts", self.router.weight.device.type)
        if not choice.fast:
            return choice
        reason = self._types(x) or _replaced(experts)
        return Choice("reference", reason) if reason else choice

    def _types(self, x: Optional[Tensor]) -> str:
        """Why the op cannot run on these dtypes and devices; empty when it can."""
        weight = self.router.weight
        if weight.dtype not in DTYPES or weight.dtype == torch.float64 and weight.device.type != "cpu":
            return f"weights of {weight.dtype}"
        if x is None:
            return ""
        if x.device != weight.device:
            return f"x is on {x.device}, weights on {weight.device}"
        # Under autocast float32 master weights are read as they are.
        compute = compute_dtype(x)
        master = weight.dtype == torch.float32 and compute in (torch.bfloat16, torch.float16) and compute != x.dtype
        return "" if weight.dtype == compute or master else f"x is computed in {compute}, weights are {weight.dtype}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        flat = x.reshape(-1, x.shape[-1])
        routed, shared = list(self.routed_experts._modules.values()), self.shared_experts._modules.values()
        repeated = self._of_this_forward(compute_dtype(x))
        inference = repeated is None and _is_inference_on_cpu(flat)
        looked_at = repeated is not None and not self._types(x)  # its experts, when it was made
        if not looked_at and not self._backend(x, shared if inference else [*routed, *shared]).fast:
            return super().forward(x)
        expert_idx, gates, load = moe_route(self.router(flat), self.router_bias, self.topk)
        local_idx = expert_idx
        if inference:
            local_idx, routed = _used(expert_idx, load, routed)
            if _replaced(routed):
                return super().forward(x)
        self.record_load(expert_idx, load)
        arguments = (flat.to(compute_dtype(x)), local_idx, gates.to(flat.dtype))
        call = repeated or (lambda *given: moe_experts(*given, *expert_weights(routed), *expert_weights(shared)))
        return call(*arguments).to(x.dtype).view_as(x)

    def _of_this_forward(self, dtype: torch.dtype) -> Optional[RepeatedExperts]:
        """Its experts for several calls of this forward in `dtype`, if there are to be several."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or packs_saved():
            return None
        held = _repeated.get().get(id(self))
        return held if held is not None and held.dtype in (dtype, torch.float32) else None


_repeated: ContextVar[dict[int, RepeatedExperts]] = ContextVar("repeated", default={})


@contextlib.contextmanager
def summing_in_place(core: nn.Module) -> Iterator[None]:
    """Within, the calls of every MoEFFN in core sum the gradients of its weights in place: one forward of a loop."""
    layers = [m for m in core.modules() if type(m) is MoEFFN] if torch.is_grad_enabled() and not forced() else []
    # Hooks may bring other parameters for every call (FSDP does), and transforms want to see every call by itself.
    watched = layers and (global_hooks() or any(map(has_hooks, core.modules())))
    if watched or torch._C._functorch.maybe_current_level() is not None:
        layers = []
    held = {id(layer): layer.repeated() for layer in layers if layer.backend().fast}
    token = _repeated.set(_repeated.get() | held)
    try:
        yield
    finally:
        _repeated.reset(token)


def _is_inference_on_cpu(flat: Tensor) -> bool:
    """Whether to look at the chosen indices, which are on the host, and touch only the used experts.

    Looking at every expert is a hundred cache misses and more, which takes as long as one token's arithmetic; a graph
    must not depend on data, so compilers see all experts, and training gives every expert its gradient.
    """
    if flat.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return type(flat) is Tensor and not is_in_torch_dispatch_mode()  # fake tensors have no data


def _used(expert_idx: Tensor, load: Tensor, experts: list[nn.Module]) -> tuple[Tensor, list[nn.Module]]:
    """expert_idx counted among the chosen experts, and these in their order: the op's result is the same to the bit."""
    used = [e for e, tokens in enumerate(load.tolist()) if tokens] or [0]  # the op wants one at least, even for no token
    place = [0] * len(experts)
    for i, e in enumerate(used):
        place[e] = i
    return torch.tensor(place)[expert_idx], [experts[e] for e in used]


def expert_weights(experts: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The experts' own gate, up and down weights. Plain dict look-ups: attribute access on modules is far slower."""
    parts = [expert._modules for expert in experts]
    return tuple([part[name]._parameters["weight"] for part in parts] for name in ("gate", "up", "down"))


def _replaced(experts: Iterable[nn.Module]) -> str:
    """What the op would skip in silence by not calling the experts; empty when nothing."""
    if reason := global_hooks():
        return reason
    for expert in experts:
        if reason := expert_obstacle("an expert", expert):
            return reason
    return ""
