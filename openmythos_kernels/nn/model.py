"""Drop-in language model: generation decodes by a CUDA graph on a GPU, and without asking each module on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import openmythos
from openmythos.cache import KVCache
from openmythos.config import is_row
from openmythos.exits import exit_rule
from openmythos_kernels.nn.paths import cuda_graph, decode_token
from openmythos_kernels.runtime.backends import Choice


class OpenMythos(openmythos.OpenMythos):
    """`openmythos.OpenMythos`, same parameters and numbers.

    What `decoder` returns, and so `generate`, is faster.
    """

    paths = (cuda_graph, decode_token)

    def backend(self) -> Choice:
        """What decoding runs on, and on a GPU why not as a graph."""
        return cuda_graph.decoding(self)

    def decoder(self, kv_cache: KVCache, **depth) -> Callable[[Tensor], Tensor]:
        """As `openmythos.OpenMythos.decoder`. On a GPU the weights must stay where they are while it is in use."""
        decode, rule = super().decoder(kv_cache, **depth), exit_rule(depth.get("exit"))
        if rule is None and not cuda_graph.refuses(self):
            return cuda_graph.TokenGraph(self, kv_cache, decode, **depth)
        if depth.keys() - {"n_loops", "exit"} or is_row(depth.get("n_loops")) or (rule is not None and rule.predicts):
            return decode
        if decode_token.refuses(self):
            return decode
        return decode_token.TokenDecoder(self, kv_cache, decode, **depth)
