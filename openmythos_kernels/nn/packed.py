"""Keys and values of a loop that computes the running positions alone, packed one behind another.

Attention layers of such a loop get a `PackedKeys` for a mask. Row n of their input, (1, N, dim), is a query at
`position[n]` of its sequence; rows offset[b] .. offset[b + 1] belong to sequence b. Every layer has buffers of what
attention reads of all tokens, in which a loop replaces what its rows wrote: halted positions keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.ragged import RaggedCache


class PackedKeys:
    """What the looped attention layers of one forward share.

    Args:
        shape: (B, T) of the forward.
        device: of its tensors.
        cache: what earlier calls left and this one extends, or None.
        graded: whether gradients reach the keys: each loop then makes its buffers anew.

    Attributes:
        graded: whether gradients reach the keys.
        position: (N,) int64, each row's place among the keys of its sequence.
        offset: (B + 1,) int64, ascending from 0 to N.
        place: (N,) int64, b * T + i of each row.
        written: (n,) int64, the places in the buffers, b * S + position, of the rows that write keys.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, cache: RaggedCache | None, graded: bool):
        self.batch, self.tokens = shape
        self._cache, self.graded = cache, graded
        if cache is not None:
            cache.start(self.batch, device)
        held = list(cache.lengths) if cache is not None else [0] * self.batch
        self._held = torch.tensor(held, device=device)
        self.keys = max(held) + self.tokens  # of the longest sequence
        self._layers: dict[str, list[Tensor]] = {}
        self.walks: dict[str, Any] = {}  # by layer: see `packed_walk.Walk.of`
        self._made: list[dict[str, tuple[Tensor, dict[str, Tensor]]]] = []  # by loop and layer: places, what is cached
        self._ran = torch.zeros(self.batch * self.tokens, dtype=torch.int64, device=device)
        self._key, self._t = "", 0
        self.place = torch.arange(self.batch * self.tokens, device=device)
        self.running: Tensor | None = None
        self._locate()

    def select(self, place: Tensor, running: Tensor | None) -> None:
        """From now on the rows are the positions `place`, (N,). Only the `running` ones, (N,) bool, write keys; None:
        all do."""
        self.place, self.running = place, running
        self._locate()

    def enter(self, key: str, t: int) -> PackedKeys:
        """Loop t begins; `key` is what its layers' cache keys begin with."""
        self._key, self._t = key, t
        self._made.append({})
        self._ran[self.writing(self.place)] += 1
        return self

    def layer(self, key: str) -> str:
        """The name of the layer with this cache key."""
        return key.removeprefix(self._key)

    def held(self, layer: str) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Tokens of earlier calls whose keys in this loop are others than in the loop before: their places in the
        buffers, (n,), and what the cache holds of them. None if there are none."""
        cache = self._cache
        if cache is None or not cache.lengths or not max(cache.lengths):
            return None
        longest = max(cache.lengths)
        exists = torch.arange(longest, device=self._held.device) < self._held[:, None]
        moves = exists if self._t == 0 else exists & (cache.last[:, :longest] >= self._t)
        sequence, token = moves.nonzero(as_tuple=True)
        rows = cache.row(self._t)[sequence, token]
        return sequence * self.keys + token, {name: pool[rows] for name, pool in cache.pools[layer].items()}

    def write(self, layer: str, at: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        """Replaces what a layer's buffers hold of some tokens.

        Args:
            at: (n,), places in the buffers; None: those of this loop's rows.
            values: (n, ...) each, always as many: what attention reads of a token.

        Returns:
            The whole buffers, (B, S, ...) each.
        """
        if at is None:
            at, values = self.written, tuple(map(self.writing, values))
        size = self.batch * self.keys
        # Zeros, not garbage: a masked NaN would still spread.
        held = self._layers.get(layer) or [x.new_zeros(size, *x.shape[1:]) for x in values]
        put = torch.Tensor.index_copy if self.graded else torch.Tensor.index_copy_
        self._layers[layer] = [put(old, 0, at, new) for old, new in zip(held, values)]
        return tuple(x.unflatten(0, (self.batch, self.keys)) for x in self._layers[layer])

    def note(self, layer: str, **made: Tensor) -> None:
        """What the cache is to keep of this loop's rows, (N, ...) each."""
        if self._cache is not None:
            kept = {name: self.writing(x.detach()) for name, x in made.items()}
            self._made[-1][layer] = self.writing(self.place), kept

    def commit(self, n_loops: int) -> None:
        """Writes what the loops made to the cache; n_loops: those that the call allowed."""
        cache = self._cache
        if cache is None:
            return
        cache.extend(self._ran.unflatten(0, (self.batch, self.tokens)) - 1)
        cache.depth = min(n_loops, cache.depth or n_loops)
        columns = self._held[:, None] + torch.arange(self.tokens, device=self._held.device)
        first = cache.first.gather(1, columns).long().flatten()
        for t, layers in enumerate(self._made):
            for layer, (place, made) in layers.items():
                cache.put(layer, first[place] + cache.slot(t), **made)

    def _locate(self) -> None:
        self._sequence = self.place // self.tokens
        self.position = self._held[self._sequence] + self.place % self.tokens
        ends = torch.arange(self.batch + 1, device=self.place.device)
        self.offset = torch.searchsorted(self._sequence, ends)
        self.written = self.writing(self._sequence * self.keys + self.position)

    def writing(self, x: Tensor) -> Tensor:
        """Those rows of x (N, ...) that write keys."""
        return x if self.running is None else x[self.running]
