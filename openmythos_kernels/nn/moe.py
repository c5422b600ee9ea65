"""Drop-in mixture-of-experts layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

import openmythos
from openmythos_kernels.nn.guards import (
    compute_dtype,
    expert_obstacle,
    global_hooks,
    has_hooks,
    kind_of,
    own_methods,
    packs_saved,
    weight_obstacle,
)
from openmythos_kernels.ops.derivatives import transformed
from openmythos_kernels.ops.moe import DTYPES, RepeatedExperts, moe_experts, moe_route
from openmythos_kernels.runtime import extension
from openmythos_kernels.runtime.backends import Choice, choose, forced


class MoEFFN(openmythos.MoEFFN):
    """The reference layer in two ops: routing, and all experts, routed and shared.

    Weights are read from the experts at every call; when something stands in the
    way of reading them directly (see `backend`), the reference's forward runs.
    """

    def repeated(self) -> RepeatedExperts:
        """Its experts, for several calls of one forward; on a GPU autocast's rounding is done here, once."""
        parts = (self.routed_experts._modules.values(), self.shared_experts._modules.values())
        weight = self._weight()
        dtype = compute_dtype(weight) if weight.is_cuda and weight.dtype == torch.float32 else None
        return RepeatedExperts([weights for part in parts for weights in expert_weights(part)], dtype)

    def backend(self, x: Tensor | None = None) -> Choice:
        """What this layer runs on, and why not on something faster.

        Args:
            x: the input; without it only the module itself is judged.
        """
        experts = [*self.routed_experts._modules.values(), *self.shared_experts._modules.values()]
        if (
            reason := own_methods("this layer", self, MoEFFN, called=True)
            or self._bias_replaced()
            or _replaced(experts)
        ):
            return Choice("reference", reason)
        choice = choose("moe_experts", self._weight().device.type)
        reason = self._types(x) if choice.fast else ""
        return Choice("reference", reason) if reason else choice

    def _bias_replaced(self) -> str:
        return weight_obstacle("router_bias", self._buffers.get("router_bias"), 1)

    def _weight(self) -> Tensor:
        """One of plain experts' weights, which all have its dtype and device."""
        return next(iter(self.routed_experts._modules.values()))._modules["gate"].weight

    def _types(self, x: Tensor | None) -> str:
        """Why the op cannot run on these dtypes and devices; empty when it can."""
        weight = self._weight()
        if weight.dtype not in DTYPES or (weight.dtype == torch.float64 and weight.device.type != "cpu"):
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
        # A graph must not depend on data, so compilers see all experts, and training gives every expert its gradient.
        if (
            not (is_dynamo_compiling() or torch.is_grad_enabled())
            and type(x) is Tensor
            and forced() is None
            and not transformed()
        ):
            y = self._at_once(x)
            if y is not NotImplemented:
                return super().forward(x) if y is None else y
        repeated = self._of_this_forward(compute_dtype(x))
        looked_at = repeated is not None and not self._types(x)  # its experts, when it was made
        if not looked_at and not self.backend(x).fast:
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        expert_idx, topk_weights, load = moe_route(self.router(flat), self.router_bias, self.topk)
        self.record_load(expert_idx, load)
        arguments = (flat.to(compute_dtype(x)), expert_idx, topk_weights.to(flat.dtype))
        if repeated is not None:
            return repeated(*arguments).to(x.dtype).view_as(x)
        routed, shared = list(self.routed_experts._modules.values()), self.shared_experts._modules.values()
        if self.idle_experts == "none" and len(flat) and torch.is_grad_enabled() and not is_dynamo_compiling():
            expert_idx, routed = _only_used(expert_idx, load, routed)
            arguments = (arguments[0], expert_idx, arguments[2])
        return moe_experts(*arguments, *expert_weights(routed), *expert_weights(shared)).to(x.dtype).view_as(x)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """`forward` in one call, which asks for the router's logits and the chosen experts' weights while other threads
        begin with the shared experts: Python takes as long as one token's arithmetic.

        Looks at the chosen experts only. None where one was replaced, or something does not fit; NotImplemented where x
        is not on a CPU, or not the numbers themselves (fake, traced, batched).
        """
        parts, module = self._modules, extension.module
        if module is None or not x.is_cpu:
            return NotImplemented
        if own_methods("this layer", self, MoEFFN, called=True) or self._bias_replaced():
            return None
        shared = parts["shared_experts"]._modules.values()

        def weights(used: list[int]):
            experts = list(parts["routed_experts"]._modules.values())
            chosen = [experts[e] for e in used]
            # What was begun with is looked at here, too: nothing waits for it.
            return None if _replaced(shared) or _replaced(chosen) else expert_weights(chosen)

        try:
            begun = expert_weights(shared)
        except (AttributeError, KeyError):  # not three linear maps
            return None
        done = module.moe_inference(x, parts["router"], self._buffers["router_bias"], self.topk, begun, weights)
        if done is None or done is NotImplemented:
            return done
        y, expert_idx, load = done
        self.record_load(expert_idx, load)
        return y

    def _of_this_forward(self, dtype: torch.dtype) -> RepeatedExperts | None:
        """Its experts for several calls of this forward in `dtype`, if there are to be several."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or packs_saved():
            return None
        held = _repeated.get().get(id(self))
        return held if held is not None and held.dtype in (dtype, torch.float32) else None


_FSDP = "_fsdp_wrapped_module"  # a part of modules that lend their weights for one call
_repeated: ContextVar[dict[int, RepeatedExperts]] = ContextVar("repeated", default={})


@contextlib.contextmanager
def summing_in_place(core: nn.Module) -> Iterator[None]:
    """Within, the calls of every MoEFFN in core sum the gradients of its weights in place: one forward of a loop."""
    layers = [m for m in core.modules() if kind_of(m) is MoEFFN] if torch.is_grad_enabled() and not forced() else []
    layers = [layer for layer in layers if layer.idle_experts == "zeros"]  # all have a gradient in there
    # Hooks may bring other parameters for every call (FSDP does), and transforms want to see every call by itself.
    watched = layers and (global_hooks() or any(has_hooks(m) or _FSDP in m._modules for m in core.modules()))
    if watched or transformed():
        layers = []
    held = {id(layer): layer.repeated() for layer in layers if layer.backend().fast}
    token = _repeated.set(_repeated.get() | held)
    try:
        yield
    finally:
        _repeated.reset(token)


def _only_used(expert_idx: Tensor, load: Tensor, experts: list[nn.Module]) -> tuple[Tensor, list[nn.Module]]:
    """The experts that have tokens, and the indices among them: what autograd does not see it gives no gradient."""
    used = load > 0
    place = used.cumsum(0) - 1
    return place[expert_idx], [expert for expert, has_tokens in zip(experts, used.tolist()) if has_tokens]


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
