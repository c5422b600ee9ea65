"""Drop-in mixture-of-experts layer: a list of paths."""

from __future__ import annotations

from torch import Tensor

import openmythos
from openmythos_kernels.nn.call import Call
from openmythos_kernels.nn.paths import moe_exchanged, moe_experts, moe_inference, moe_repeated, reference, walk
from openmythos_kernels.runtime.backends import Choice


class MoEFFN(openmythos.MoEFFN):
    """`openmythos.MoEFFN`, same parameters and numbers, its experts as one op.

    Weights are read from the experts at every call; where something stands in the way of reading them directly, the
    reference's forward runs.
    """

    paths = (moe_exchanged, moe_inference, moe_repeated, moe_experts, reference)

    def backend(self, x: Tensor | None = None) -> Choice:
        """What this layer runs on, and why not on something faster.

        Args:
            x: the input; without it only the module itself is judged.
        """
        found = (moe_experts if self.exchange is None else moe_exchanged).choice(self)
        if x is None or not found.fast:
            return found
        reason = moe_experts.dtypes(Call(self, x))
        return Choice("reference", reason) if reason else found

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        return walk(self.paths, Call(self, x))

    def routed(self, flat: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """As `openmythos.MoEFFN.routed`; the exchange calls it for what arrives from other ranks."""
        found = moe_exchanged.experts(self, flat)
        return (found or super().routed)(flat, expert_idx, topk_weights)

    def reference(self, call: Call) -> Tensor:
        """The call by `openmythos.MoEFFN`."""
        return super().forward(call.x)
