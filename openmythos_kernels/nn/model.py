"""Drop-in language model: it decodes by a CUDA graph on a GPU, and without asking each module on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

import openmythos
from openmythos.cache import KVCache
from openmythos.exits import Exit, exit_rule
from openmythos.recurrence import Loops
from openmythos_kernels.nn.call import ModelCall
from openmythos_kernels.nn.norms import normed
from openmythos_kernels.nn.paths import cuda_graph, decode_token, reference, walk
from openmythos_kernels.runtime.backends import Choice


class OpenMythos(openmythos.OpenMythos):
    """`openmythos.OpenMythos`, same parameters and numbers, faster where nothing is hooked onto its parts.

    Attributes:
        decoder_paths: what `decoder` returns in place of calls of the model.
    """

    paths = (decode_token, reference)
    decoder_paths = (cuda_graph,)

    def backend(self) -> Choice:
        """What decoding runs on, and on a GPU why not as a graph."""
        return cuda_graph.decoding(self)

    def forward(
        self,
        input_ids: Tensor,
        n_loops: Loops = None,
        kv_cache: dict | None = None,
        start_pos: int | Sequence[int] | Tensor = 0,
        logits_at: Tensor | None = None,
        return_ponder: bool = False,
        grad_loops: int | None = None,
        checkpoint_loops: bool = False,
        exit: Exit = None,
        checkpoint_layers: bool = False,
        return_hidden: bool = False,
        return_trajectory: bool = False,
    ):
        """As `openmythos.OpenMythos.forward`."""
        call = ModelCall(
            *(self, input_ids, n_loops, kv_cache, start_pos, exit),
            logits_at=logits_at,
            return_ponder=return_ponder,
            grad_loops=grad_loops,
            checkpoint_loops=checkpoint_loops,
            checkpoint_layers=checkpoint_layers,
            return_hidden=return_hidden,
            return_trajectory=return_trajectory,
        )
        return walk(self.paths, call)

    def reference(self, call: ModelCall):
        """The call by `openmythos.OpenMythos`, over this model's blocks."""
        return super().forward(**call.arguments)

    def normed(self, x: Tensor) -> Tensor:
        """As `openmythos.OpenMythos.normed`."""
        return normed(self.norm, x)

    def decoder(self, kv_cache: KVCache, **depth) -> Callable[[Tensor], Tensor]:
        """As `openmythos.OpenMythos.decoder`. On a GPU the weights must stay where they are while it is in use."""
        decode = super().decoder(kv_cache, **depth)
        if exit_rule(depth.get("exit")) is None and not cuda_graph.refuses(self):
            return cuda_graph.TokenGraph(self, kv_cache, decode, **depth)
        return decode
