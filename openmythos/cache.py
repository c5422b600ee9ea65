"""KV caches: what attention layers keep of the tokens they have seen.

A model call writes into a mapping `cache key -> LayerCache`, one entry per
attention layer and loop depth. A plain dict works (its entries grow as
needed); a `KVCache` preallocates them and knows the cache as a whole.

Rows of a batch may hold different numbers of tokens: new tokens of row b are
written from `lengths[b]` on, and causal masking by position hides whatever
lies behind a row's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

LOOP_KEY = "recurrent_loop_{}"
# Names that differ in open-mythos' caches.
_THEIR_NAMES = {"latent": "c_kv"}


class LayerCache:
    """Keys and values of one attention layer at one loop depth.

    Attributes:
        tensors: name -> (B, capacity, ...); latent attention keeps "latent"
            (B, capacity, kv_lora_rank, already normed) and "k_rope" (B, capacity,
            rope, rotated, shared by all heads), GQA keeps "k" and "v".
        lengths: tokens held by each row.

    Read as a mapping, an entry shows what it holds, (B, S, ...) with S the longest row, by open-mythos' names: "c_kv"
    (here the latent behind its norm) and "k_rope" (B, S, 1, rope; open-mythos repeats it for every head), or "k" and
    "v".
    """

    def __init__(self, capacity: int = 0):
        self._wanted = capacity
        self.tensors: dict[str, Tensor] = {}
        self.lengths: list[int] = []

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[1] if self.tensors else self._wanted

    @property
    def uniform(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return min(self.lengths, default=0) == max(self.lengths, default=0)

    def _shown(self) -> dict[str, Tensor]:
        held = {_THEIR_NAMES.get(name, name): x[:, : max(self.lengths, default=0)] for name, x in self.tensors.items()}
        return {name: x.unsqueeze(2) if name == "k_rope" else x for name, x in held.items()}

    def keys(self):
        return self._shown().keys()

    def values(self):
        return self._shown().values()

    def items(self):
        return self._shown().items()

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:
        return self._shown().get(name, default)

    def __getitem__(self, name: str) -> Tensor:
        return self._shown()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._shown()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown())

    def reserve(self, tokens: int, **like: Tensor) -> None:
        """Makes room for `tokens` more per row. `like` gives names, shapes (B, T, ...), dtypes and devices.

        Rows that share memory, as after an `expand` to a batch, get their own.

        Raises:
            ValueError: if names, batch size, shape per token, dtype or device differ from what the cache holds.
        """
        if not self.tensors:
            batch = next(iter(like.values())).shape[0]
            self.lengths = self.lengths or [0] * batch
        elif (held := _signature(self.tensors)) != (came := _signature(like)):
            raise ValueError(
                "kv_cache: (batch, shape per token, dtype, device) of what it holds is "
                f"{held}, of the new tokens {came}: they must be the same"
            )
        for name, held in self.tensors.items():
            if any(step == 0 and size > 1 for step, size in zip(held.stride(), held.shape)):
                self.tensors[name] = held.contiguous()
        needed = max(self.lengths) + tokens
        if self.tensors and needed <= self.capacity:
            return
        # Doubling keeps the cost of growth constant per token.
        capacity = max(needed, 2 * self.capacity) if self.tensors else max(needed, self._wanted)
        used = max(self.lengths)
        for name, new in like.items():
            # Zeros, not garbage: whatever reads past a row's end must not meet NaN.
            grown = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
            if name in self.tensors:
                grown[:, :used] = self.tensors[name][:, :used]
            self.tensors[name] = grown

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        """Writes new tokens (B, T, ...) behind each row's last one.

        Returns:
            For each argument everything now held, (B, S, ...) with S the longest row. Where a
            new tensor requires grad, gradients reach it (not the tokens cached before).
        """
        tokens = next(iter(new.values())).shape[1]
        self.reserve(tokens, **{name: value.detach() for name, value in new.items()})
        start, end = self.lengths, max(self.lengths) + tokens
        rows, places = None, None
        if not self.uniform:
            device = next(iter(new.values())).device
            rows = torch.arange(len(start), device=device)[:, None]
            places = torch.tensor(start, device=device)[:, None] + torch.arange(tokens, device=device)
        out = []
        for name, value in new.items():
            held = self.tensors[name]
            if rows is None:
                held[:, start[0] : end] = value.detach()
            else:
                held[rows, places] = value.detach()
            seen = held[:, :end]
            if torch.is_grad_enabled():
                # A copy: autograd may save it, and the next call writes into what is held.
                seen = (
                    torch.cat((seen[:, : start[0]], value), dim=1)
                    if rows is None
                    else seen.index_put((rows, places), value)
                )
            out.append(seen)
        self.lengths = [n + tokens for n in start]
        return tuple(out)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens behind `lengths[b]` in every row b."""
        if len(lengths) != len(self.lengths) or any(not 0 <= n <= h for n, h in zip(lengths, self.lengths)):
            raise ValueError(f"lengths = {list(lengths)}: must be per row within what the cache holds, {self.lengths}")
        self.lengths = list(lengths)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def _signature(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """What the tokens of one entry have in common."""
    return {name: (t.shape[0], tuple(t.shape[2:]), t.dtype, t.device) for name, t in tensors.items()}


class KVCache(dict):
    """The caches of a whole model: `cache key -> LayerCache`.

    Args:
        capacity: tokens per row to allocate at first use; entries grow past it by doubling.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row; empty before the first use."""
        return cached_lengths(self)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens behind `lengths[b]` in every row b, in every layer."""
        for entry in self.values():
            entry.truncate([min(n, held) for n, held in zip(lengths, entry.lengths)])

    def nbytes(self) -> int:
        """Bytes allocated by all layers and loop depths."""
        return sum(entry.nbytes() for entry in self.values())


def layer_cache(
    kv_cache: dict | None, key: str, taken_over: Callable[[dict], dict[str, Tensor]] | None = None
) -> LayerCache | None:
    """The entry of one attention layer, made at first use; None without a cache.

    Args:
        taken_over: what a layer's LayerCache holds for the dict of tensors that open-mythos kept of it.
    """
    if kv_cache is None:
        return None
    entry = kv_cache.get(key)
    if entry is None:
        entry = kv_cache[key] = LayerCache(getattr(kv_cache, "capacity", 0))
    elif type(entry) is dict and taken_over is not None:
        lengths, theirs = held_lengths(entry), taken_over(entry)
        entry = kv_cache[key] = LayerCache()
        entry.lengths, entry.tensors = lengths, theirs
    return entry


def held_lengths(entry) -> list[int]:
    """Tokens held per row by a LayerCache, or by open-mythos' dict of tensors (B, S, ...)."""
    if type(entry) is not dict:
        return entry.lengths
    tensor = next(iter(entry.values()))
    return [tensor.shape[1]] * tensor.shape[0]


def cached_lengths(kv_cache: dict | None) -> list[int]:
    """Tokens held per row by the fullest entry: layers outside the loop see every token."""
    if not kv_cache:
        return []
    return max((held_lengths(entry) for entry in kv_cache.values()), key=sum)


def check_cache(kv_cache: dict, start: Sequence[int], n_loops: int) -> None:
    """Checks that `start` continues the cache and that every loop depth to be run is filled.

    Raises:
        ValueError: naming start_pos or n_loops.
    """
    held = cached_lengths(kv_cache) or [0] * len(start)
    if list(start) != held:
        raise ValueError(
            f"start_pos = {list(start)}: the kv_cache holds {held} tokens per row; decoding continues there"
        )
    if not any(held):
        return
    depth = 0
    while (entry := kv_cache.get(LOOP_KEY.format(depth)) or kv_cache.get(LOOP_KEY.format(depth) + ".0")) is not None:
        if held_lengths(entry) != held:
            break
        depth += 1
    if n_loops > depth:
        raise ValueError(
            f"n_loops = {n_loops}: the kv_cache was filled with {depth} loops; "
            "later loops would find no keys of earlier tokens. Prefill with at least as many loops."
        )


class FrozenKeys:
    """The cache as one loop of freeze halting sees it.

    Positions that still run add the keys they made in this loop; halted ones
    keep the keys of the last loop they ran, so a position i at loop t attends to
    j through what j made at loop min(t, last loop of j).

    Args:
        kv_cache: the mapping behind, or None (training: all positions at once).
        key: cache key of this loop.
        running: (B, T) bool.
        before: the `kept` of the previous loop; None in the first.
    """

    def __init__(self, kv_cache: dict | None, key: str, running: Tensor, before: dict | None):
        self._kv_cache, self._key = kv_cache, key
        self._running, self._before = running, before
        self.kept: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> _FrozenLayer:
        return _FrozenLayer(self, key)


class _FrozenLayer:
    """One attention layer's entry in a FrozenKeys."""

    def __init__(self, owner: FrozenKeys, key: str):
        self._owner, self._key = owner, key

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        owner = self._owner
        layer = self._key.removeprefix(owner._key)  # the same layer has another key in every loop
        if owner._before is not None:
            new = {
                name: torch.where(owner._running[(..., *[None] * (value.dim() - 2))], value, owner._before[layer][name])
                for name, value in new.items()
            }
        owner.kept[layer] = new
        if owner._kv_cache is None:
            return tuple(new.values())
        return layer_cache(owner._kv_cache, self._key).append(**new)
