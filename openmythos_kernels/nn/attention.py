"""Drop-in latent attention: one op for a decode step, PyTorch's fused attention for prompts and training."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import openmythos
from openmythos.attention import CausalMask, Mask
from openmythos.cache import LayerCache, layer_cache
from openmythos.layers import RMSNorm
from openmythos_kernels.ops import mla
from openmythos_kernels.runtime.backends import Choice, choose

_LINEARS = ("q_down", "q_up_nope", "q_up_rope", "kv_down", "kv_up", "wo")
_NORMS = ("q_norm", "kv_norm")


class MLAttention(openmythos.MLAttention):
    """`openmythos.MLAttention`, same parameters and numbers, faster forward.

    A cached single token per row without gradients runs as one C++ op. Everything else with a
    causal mask or none runs the reference's projections around PyTorch's fused attention.
    """

    def backend(self) -> Choice:
        """What a decode step of this module runs on, as far as the module itself decides it, and why."""
        weight = self.wo.weight
        choice = choose("mla_decode", weight.device.type)
        if not choice.fast:
            return choice
        reason = self._obstacle()
        return Choice("reference", reason) if reason else choice

    def _obstacle(self) -> str:
        """Why the op must not stand in for this module's parts; empty when it may."""
        parts = self._modules
        dtype = parts["wo"].weight.dtype
        if dtype not in mla.DTYPES:
            return f"weights of {dtype}"
        for name in _LINEARS:
            part = parts[name]
            if type(part) is not nn.Linear:
                return f"{name} is a {type(part).__name__}, not a plain Linear"
            if part._parameters["bias"] is not None:
                return f"{name} has a bias"
            if part._forward_hooks or part._forward_pre_hooks:
                return f"{name} has forward hooks"
            if part._parameters["weight"].dtype != dtype:
                return f"{name} and wo have different dtypes"
        for name in _NORMS:
            part = parts[name]
            if not isinstance(part, RMSNorm):
                return f"{name} is a {type(part).__name__}, not an RMSNorm"
            if part._forward_hooks or part._forward_pre_hooks:
                return f"{name} has forward hooks"
            if part._parameters["weight"].dtype != dtype:
                return f"{name} and wo have different dtypes"
        if parts["q_norm"].eps != parts["kv_norm"].eps:
            return "q_norm and kv_norm have different eps"
        return ""

    def _decodes(self, x: Tensor, mask: Mask, entry: Optional[LayerCache]) -> bool:
        """Whether this very call is a decode step that the op computes exactly."""
        if x.shape[1] != 1 or type(entry) is not LayerCache or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        if self.training and self.attn_drop.p:
            return False
        if x.dtype != self._modules["wo"].weight.dtype or not self.backend().fast:
            return False
        held = entry.lengths or [0] * x.shape[0]
        if mask is None:
            return entry.uniform  # keys behind a shorter row's end would be seen
        if type(mask) is not CausalMask:
            return False
        start = mask.start
        return all(n == start for n in held) if isinstance(start, int) else list(start) == held

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Mask = None,
        kv_cache: Optional[dict] = None,
        cache_key: str = "default",
    ) -> Tensor:
        """As `openmythos.MLAttention.forward`."""
        entry = layer_cache(kv_cache, cache_key)
        if self._decodes(x, mask, entry):
            return self._decode(x, freqs_cis, entry)
        return super().forward(x, freqs_cis, mask, kv_cache, cache_key)

    def _decode(self, x: Tensor, freqs_cis: Tensor, entry: LayerCache) -> Tensor:
        rows, _, dim = x.shape
        entry.reserve(
            1, latent=x.new_empty(rows, 1, self.kv_lora_rank), k_rope=x.new_empty(rows, 1, self.qk_rope_dim)
        )
        lengths = entry.lengths
        parts = self._modules
        y = mla.decode(
            x.view(rows, dim),
            torch.view_as_real(freqs_cis).view(-1, self.qk_rope_dim // 2, 2),
            entry.tensors["latent"],
            entry.tensors["k_rope"],
            torch.tensor(lengths),
            **{name: parts[name]._parameters["weight"] for name in (*_LINEARS, *_NORMS)},
            n_heads=self.n_heads,
            nope=self.qk_nope_dim,
            rope=self.qk_rope_dim,
            v=self.v_dim,
            eps=self.q_norm.eps,
        )
        entry.lengths = [n + 1 for n in lengths]
        return y.view(rows, 1, dim)
