"""Drop-in transformer block: norms with the residual addition before them as one op, and a dense FFN as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import openmythos
from openmythos.attention import Mask
from openmythos.cache import layer_cache
from openmythos.dropout import drops
from openmythos.layers import RMSNorm
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.causal import recognised
from openmythos_kernels.nn.guards import compute_dtype, expert_obstacle, global_hooks, kind_of, obstacle
from openmythos_kernels.nn.paths.decode_block import through_block
from openmythos_kernels.nn.paths.prefill_block import through_prompt
from openmythos_kernels.ops.moe.ffn import swiglu_ffn
from openmythos_kernels.ops.norm import DTYPES, add_rms_norm, rms_norm
from openmythos_kernels.runtime.backends import Choice, choose


class TransformerBlock(openmythos.TransformerBlock):
    """`openmythos.TransformerBlock`, same parameters and numbers, faster where nothing is hooked onto its parts."""

    def backend(self) -> Choice:
        """What this block's norms run on, as far as the module by itself decides it, and why not on something
        faster."""
        if reason := self._replaced():
            return Choice("reference", reason)
        device = self._modules["attn_norm"].weight.device.type
        choice, dtype = choose("rms_norm", device), self.dtype
        if not choice.fast:
            return choice
        if dtype not in DTYPES:
            return Choice("reference", f"weights of {dtype}")
        if dtype == torch.float64 and device != "cpu":
            return Choice("reference", "weights of float64 on a GPU")
        return choice

    def _replaced(self) -> str:
        """What the ops would bypass by not calling the submodules; empty if nothing."""
        parts = self._modules
        reason = global_hooks() or obstacle("resid_drop", parts["resid_drop"], nn.Dropout)
        reason = reason or obstacle("attn_norm", parts["attn_norm"], RMSNorm)
        return reason or obstacle("ffn_norm", parts["ffn_norm"], RMSNorm)

    @property
    def dtype(self) -> torch.dtype:
        return self._modules["attn_norm"]._parameters["weight"].dtype

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """As `openmythos.TransformerBlock.forward`."""
        if kv_cache is not None and x.shape[1] == 1:
            y = through_block(self, x, freqs_cis, mask, layer_cache(kv_cache, cache_key))
            if y is not None:
                return y
        if kv_cache is None:
            y = through_prompt(self, x, freqs_cis, recognised(mask, x.shape[1], x.shape[1]))
            if y is not None:
                return y
        parts = self._modules
        before, behind = parts["attn_norm"], parts["ffn_norm"]
        if not self.backend().fast or x.dtype != self.dtype or drops(parts["resid_drop"]):
            return super().forward(x, freqs_cis, mask, kv_cache, cache_key)
        attended = parts["attn"](rms_norm(x, before.weight, before.eps), freqs_cis, mask, kv_cache, cache_key)
        # Under autocast the attention may come out in low precision; adding then widens it, as in the reference.
        x, normed = add_rms_norm(x, attended.to(x.dtype), behind.weight, behind.eps)
        return x + self._ffn(normed)

    def _ffn(self, x: Tensor) -> Tensor:
        ffn, dtype = self._modules["ffn"], compute_dtype(x)
        if self.dense_obstacle(x.dtype):
            return ffn(x)
        weights = (ffn._modules[name]._parameters["weight"] for name in ("gate", "up", "down"))
        return swiglu_ffn(x.to(dtype), *(weight.to(dtype) for weight in weights))

    def dense_obstacle(self, dtype: torch.dtype) -> str:
        """Why the op must not stand in for the FFN (a mixture of experts, a hook, an adapter); empty when it may."""
        ffn = self._modules["ffn"]
        if reason := expert_obstacle("ffn", ffn):
            return reason
        weights = [part._parameters["weight"] for part in ffn._modules.values()]
        if any(weight.dtype != dtype for weight in weights):
            return "ffn has weights of another dtype"
        choice = choose("swiglu_ffn", weights[0].device.type)
        return "" if choice.fast else choice.reason


def takes_causal(core: nn.Module) -> bool:
    """Whether every attention layer in a block, or a stack of them, takes a CausalMask for a tensor."""
    layers = [m._modules["attn"] for m in core.modules() if isinstance(m, openmythos.TransformerBlock)]
    return all(kind_of(layer) in (MLAttention, openmythos.MLAttention, openmythos.GQAttention) for layer in layers)
