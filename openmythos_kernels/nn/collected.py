"""Results of positions that leave a loop early, joined at the end in the order of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Collected:
    """Results of (B, T) positions, added some at a time.

    Args:
        shape: (B, T, ...) of the whole batch.
    """

    def __init__(self, shape: torch.Size):
        self.batch, self.tokens = shape[:2]
        self._places: list[Tensor] = []
        self._results: list[Tensor] = []
        self._ponder: list[Tensor] = []

    def add(self, places: Tensor, result: Tensor, ponder: Tensor | None) -> None:
        """Adds positions by their places b * T + i, (n,): result (n, dim), ponder (n,)."""
        if result.numel() == 0:
            return
        self._places.append(places)
        self._results.append(result)
        if ponder is not None:
            self._ponder.append(ponder)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Result (B, T, dim) and ponder cost (B, T) or None."""
        shape = (self.batch, self.tokens)
        if len(self._results) == 1:
            return self._results[0].unflatten(0, shape), self._ponder[0].unflatten(0, shape) if self._ponder else None
        back = torch.cat(self._places).argsort()
        result = torch.cat(self._results).index_select(0, back).unflatten(0, shape)
        return result, torch.cat(self._ponder).index_select(0, back).unflatten(0, shape) if self._ponder else None
