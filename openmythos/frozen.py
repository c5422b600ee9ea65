"""Keys of positions that freeze: what attention reads in each loop once some positions have halted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos.ragged import RaggedCache


class FrozenKeys:
    """The cache of the looped layers as a forward with freezing positions sees it.

    A running position adds the keys of this loop. A halted position keeps the keys of its last loop. So position i in
    loop t attends to the keys that position j made in loop min(t, last loop of j).

    Args:
        cache: what earlier calls left, or None in training, where all positions come at once.
    """

    def __init__(self, cache: RaggedCache | None):
        self._cache = cache
        self._now: dict[str, dict[str, Tensor]] = {}  # layer -> name -> the keys of this loop, (B, T, ...)
        self._made: list[dict[str, dict[str, Tensor]]] = []  # the same for each loop, for the cache
        self._key, self._t = "", 0
        self._running: Any = None  # (B, T) bool, the positions that this loop runs
        self._ran: Tensor | None = None  # loops that each position ran, (B, T)

    def enter(self, key: str, t: int, running: Tensor) -> FrozenKeys:
        """Loop t begins: `key` is what its layers' cache keys begin with, running (B, T) bool the positions it runs."""
        self._key, self._t, self._running = key, t, running
        if self._cache is not None:
            self._cache.start(len(running), running.device)
            self._ran = running.long() if self._ran is None else self._ran + running
            self._made.append({})
        return self

    def get(self, key: str) -> _FrozenLayer:
        return _FrozenLayer(self, key.removeprefix(self._key))

    def append(self, layer: str, new: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The keys of all tokens in this loop, (B, S, ...); `new` are those that this loop made, (B, T, ...)."""
        before = self._now.get(layer)
        if before is not None:
            new = {name: torch.where(_like(self._running, x), x, before[name]) for name, x in new.items()}
        self._now[layer] = new
        if self._cache is None:
            return tuple(new.values())
        self._made[-1][layer] = {name: x.detach() for name, x in new.items()}
        return tuple(self._behind(self._cache, layer, name, x) for name, x in new.items())

    def commit(self, n_loops: int) -> None:
        """Writes what the loops made to the cache; n_loops: those that the call allowed."""
        cache, ran = self._cache, self._ran
        if cache is None or ran is None:
            return
        held, last = list(cache.lengths), ran - 1
        cache.extend(last)
        cache.depth = min(n_loops, cache.depth or n_loops)
        columns = torch.tensor(held, device=ran.device)[:, None] + torch.arange(ran.shape[1], device=ran.device)
        first = cache.first.gather(1, columns).long()
        for t, layers in enumerate(self._made):
            runs = last >= t
            for layer, made in layers.items():
                cache.put(layer, (first + cache.slot(t))[runs], **{name: x[runs] for name, x in made.items()})

    def _behind(self, cache: RaggedCache, layer: str, name: str, new: Tensor) -> Tensor:
        """`new` behind what the cache holds of each sequence."""
        held = cache.lengths
        if not any(held):
            return new
        old = cache.pools[layer][name][cache.row(self._t)]
        if min(held) == max(held):
            return torch.cat((old, new), 1)
        tokens = new.shape[1]
        seen = torch.cat((old, torch.zeros_like(new)), 1)
        rows = torch.arange(len(held), device=new.device)[:, None]
        places = torch.tensor(held, device=new.device)[:, None] + torch.arange(tokens, device=new.device)
        return seen.index_put((rows, places), new)


class _FrozenLayer:
    """One attention layer's entry in a FrozenKeys."""

    def __init__(self, owner: FrozenKeys, layer: str):
        self._owner, self._layer = owner, layer

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        return self._owner.append(self._layer, new)


def _like(running: Tensor, value: Tensor) -> Tensor:
    """`running` (B, T) with as many dimensions as `value` (B, T, ...)."""
    index = (..., *[None] * (value.dim() - 2))
    return running[index]
