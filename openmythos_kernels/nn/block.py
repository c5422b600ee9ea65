"""Drop-in transformer block: norms with the residual addition before them as one op, and a dense FFN as one."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn

import openmythos
from openmythos.attention import Mask
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.plain import expert_obstacle, global_hooks, obstacle
from openmythos_kernels.ops.moe.ffn import swiglu_ffn
from openmythos_kernels.ops.norm import DTYPES, add_rms_norm, rms_norm
from openmythos_kernels.runtime.backends import Choice, choose


class TransformerBlock(openmythos.TransformerBlock):
    """`openmythos.TransformerBlock`, same parameters and numbers, faster where nothing is hooked onto its parts."""

    def backend(self) -> Choice:
        """What this block's norms run on, as far as the module by itself decides it, and why not on something faster."""
        choice = choose("rms_norm", self._modules["attn_norm"].weight.device.type)
        reason = self._obstacle() if choice.fast else ""
        return Choice("reference", reason) if reason else choice

    def _obstacle(self) -> str:
        """What the ops would bypass by not calling the submodules, or cannot compute; empty if nothing."""
        parts = self._modules
        reason = global_hooks() or obstacle("resid_drop", parts["resid_drop"], nn.Dropout)
        reason = reason or obstacle("attn_norm", parts["attn_norm"], RMSNorm)
        reason = reason or obstacle("ffn_norm", parts["ffn_norm"], RMSNorm)
        if not reason and self._dtype() not in DTYPES:
            reason = f"weights of {self._dtype()}"
        return reason

    def _dtype(self) -> torch.dtype:
        return self._modules["attn_norm"]._parameters["weight"].dtype

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Mask = None,
        kv_cache: Optional[dict] = None,
        cache_key: str = "default",
    ) -> Tensor:
        """As `openmythos.TransformerBlock.forward`."""
        parts = self._modules
        before, behind = parts["attn_norm"], parts["ffn_norm"]
        dropped = self.training and parts["resid_drop"].p
        if dropped or x.dtype != self._dtype() or not self.backend().fast:
            return super().forward(x, freqs_cis, mask, kv_cache, cache_key)
        attended = parts["attn"](rms_norm(x, before.weight, before.eps), freqs_cis, mask, kv_cache, cache_key)
        # Under autocast the attention may come out in low precision; adding then widens it, as in the reference.
        x, normed = add_rms_norm(x, attended.to(x.dtype), behind.weight, behind.eps)
        return x + self._ffn(normed)

    def _ffn(self, x: Tensor) -> Tensor:
        ffn = self._modules["ffn"]
        device = x.device.type
        if torch.is_autocast_enabled(device) or not choose("swiglu_ffn", device).fast or _replaced(ffn, x.dtype):
            return ffn(x)
        return swiglu_ffn(x, *(ffn._modules[name]._parameters["weight"] for name in ("gate", "up", "down")))


def _replaced(ffn: nn.Module, dtype: torch.dtype) -> str:
    """Why the op must not stand in for the FFN (a mixture of experts, a hook, an adapter); empty when it may."""
    if reason := expert_obstacle("ffn", ffn):
        return reason
    same = all(part._parameters["weight"].dtype == dtype for part in ffn._modules.values())
    return "" if same else "ffn has weights of another dtype"
