"""Drop-in language model: on a GPU generation decodes by a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import openmythos
from openmythos.cache import KVCache
from openmythos_kernels.nn.paths import cuda_graph
from openmythos_kernels.runtime.backends import Choice


class OpenMythos(openmythos.OpenMythos):
    """`openmythos.OpenMythos`, same parameters and numbers.

    What `decoder` returns, and so `generate`, is faster on GPUs.
    """

    paths = (cuda_graph,)

    def backend(self) -> Choice:
        """What decoding runs on, and on a GPU why not as a graph."""
        return cuda_graph.decoding(self)

    def decoder(self, kv_cache: KVCache, **depth) -> Callable[[Tensor], Tensor]:
        """As `openmythos.OpenMythos.decoder`. On a GPU the weights must stay where they are while it is in use."""
        decode = super().decoder(kv_cache, **depth)
        eager = depth.get("exit") is not None or cuda_graph.refuses(self)
        return decode if eager else cuda_graph.TokenGraph(self, kv_cache, decode, **depth)
