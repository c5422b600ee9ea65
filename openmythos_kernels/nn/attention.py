"""Drop-in latent attention: a list of paths."""

from __future__ import annotations

from torch import Tensor

import openmythos
from openmythos.attention import Mask
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.paths import (
    mla_attention,
    mla_decode,
    mla_packed,
    mla_packed_recompute,
    mla_recompute,
    reference,
    sdpa,
    walk,
)
from openmythos_kernels.runtime.backends import Choice


class MLAttention(openmythos.MLAttention):
    """`openmythos.MLAttention`, same parameters and numbers, faster forward.

    Attributes:
        recompute: whether training keeps only the latents, q_lora_rank + kv_lora_rank + rope numbers a token, of what
            goes through `mla.attention`, and computes queries, keys, values and output again in the backward pass, in
            calls where these take `THRESHOLDS["mla_recompute"]` bytes or more. Switch it off where memory is plentiful:
            training is then a little faster.
    """

    recompute: bool = True
    paths = (mla_packed_recompute, mla_packed, mla_decode, mla_recompute, mla_attention, sdpa, reference)

    def backend(self) -> Choice:
        """What a decode step runs on, as far as this module by itself decides it, and why."""
        return mla_decode.choice(self)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """As `openmythos.MLAttention.forward`."""
        return walk(self.paths, LayerCall(self, x, freqs_cis, mask, kv_cache, cache_key, self.taken_over))

    def reference(self, call: LayerCall) -> Tensor:
        """The call by `openmythos.MLAttention`."""
        return super().forward(call.x, call.freqs_cis, call.causal, call.kv_cache, call.cache_key)
