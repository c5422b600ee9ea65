"""Drop-in transformer block: a list of paths."""

from __future__ import annotations

from torch import Tensor

import openmythos
from openmythos.attention import Mask
from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.paths import decode_block, fused_norms, prefill_block, reference, walk
from openmythos_kernels.runtime.backends import Choice


class TransformerBlock(openmythos.TransformerBlock):
    """`openmythos.TransformerBlock`, same parameters and numbers, faster where nothing is hooked onto its parts."""

    paths = (decode_block, prefill_block, fused_norms, reference)

    def backend(self) -> Choice:
        """What this block's norms run on, as far as the module by itself decides it, and why not on something
        faster."""
        return fused_norms.choice(self)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """As `openmythos.TransformerBlock.forward`."""
        return walk(self.paths, LayerCall(self, x, freqs_cis, mask, kv_cache, cache_key))

    def reference(self, call: LayerCall) -> Tensor:
        """The call by `openmythos.TransformerBlock`."""
        return super().forward(call.x, call.freqs_cis, call.mask, call.kv_cache, call.cache_key)
