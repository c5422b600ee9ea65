"""Drop-in language model: on a GPU generation decodes by a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import openmythos
from openmythos.config import setting
from openmythos_kernels.nn.guards import global_hooks, has_hooks
from openmythos_kernels.nn.paths.cuda_graph import TokenGraph
from openmythos_kernels.runtime.backends import Choice, choose


class OpenMythos(openmythos.OpenMythos):
    """`openmythos.OpenMythos`, same parameters and numbers; what `decoder` returns, and so `generate`, is faster on
    GPUs."""

    def backend(self) -> Choice:
        """What decoding runs on, and on a GPU why not as a graph."""
        device = self.embed.weight.device.type
        choice = choose("mla_decode", device)
        reason = self._obstacle() if choice.fast and device == "cuda" else ""
        return Choice(choice.backend, f"not as a graph: {reason}") if reason else choice

    def _obstacle(self) -> str:
        """What a graph, which calls no module, would pass over; empty if nothing."""
        if self.cfg.attn_type != "mla":
            return "grouped-query attention keeps its cache by the host"
        if (h0 := setting(self.cfg, "h0")) not in ("e", "zeros"):
            return f'h0="{h0}" is random'
        hooked = next((name or "the model" for name, module in self.named_modules() if has_hooks(module)), "")
        return global_hooks() or (hooked and f"{hooked} has hooks")

    def decoder(self, kv_cache: dict, **depth) -> Callable[[Tensor], Tensor]:
        """As `openmythos.OpenMythos.decoder`. On a GPU the weights must stay where they are while it is in use."""
        decode, choice = super().decoder(kv_cache, **depth), self.backend()
        as_graph = choice.fast and not choice.reason and self.embed.weight.is_cuda
        return TokenGraph(self, kv_cache, decode, **depth) if as_graph else decode
