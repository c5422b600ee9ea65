"""The dense transformer to compare a Recurrent-Depth Transformer with: the same blocks, no loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from openmythos.block import TransformerBlock
from openmythos.cache import check_cache
from openmythos.config import MythosConfig
from openmythos.model import LanguageModel


@dataclass
class DenseConfig(MythosConfig):
    """A MythosConfig of n_layers separate blocks; the fields of the loop are unused."""

    n_layers: int = 24

    def validate(self) -> None:
        super().validate()
        self._integer("n_layers", 1)


class DenseTransformer(LanguageModel):
    """Embedding -> n_layers blocks with dense FFNs -> norm -> head."""

    def __init__(self, cfg: DenseConfig):
        super().__init__(cfg)
        self.layers = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layers))
        self._finish()

    def forward(
        self,
        input_ids: Tensor,
        kv_cache: dict | None = None,
        start_pos: int | Sequence[int] | Tensor = 0,
        logits_at: Tensor | None = None,
        checkpoint_layers: bool = False,
        return_hidden: bool = False,
    ) -> Tensor:
        """As `OpenMythos.forward`, without loops."""
        x, freqs_cis, mask, starts = self._embed(input_ids, start_pos, kv_cache is not None)
        if kv_cache is not None:
            check_cache(kv_cache, starts, n_loops=0)
        x = self._layers(self.layers, "layer", x, freqs_cis, mask, kv_cache, checkpoint_layers)
        return self._logits(x, logits_at, return_hidden)
