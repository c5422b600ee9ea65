"""KV caches: what attention layers keep of the tokens they have seen.

A model call writes into a mapping `cache key -> LayerCache`, with one entry per attention layer and loop. A plain dict
works; its entries grow as needed. A `KVCache` preallocates its entries and has operations on the cache as a whole.

Rows of a batch may hold different numbers of tokens. New tokens of row b are written from `lengths[b]` on, and the
causal mask hides what lies behind a row's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from openmythos.config import whole_number
from openmythos.ragged import RAGGED_KEY, RaggedCache

LOOP_KEY = "recurrent_loop_{}"
# Names that are different in open-mythos' caches.
_THEIR_NAMES = {"latent": "c_kv"}


class LayerCache:
    """Keys and values of one attention layer at one loop.

    Attributes:
        tensors: name -> (B, capacity, ...). Latent attention keeps "latent" (B, capacity, kv_lora_rank), normed, and
            "k_rope" (B, capacity, rope), rotated and shared by all heads. GQA keeps "k" and "v".
        lengths: tokens held by each row.

    Read as a mapping, an entry has open-mythos' names, each (B, S, ...) with S the longest row: "c_kv" (here the normed
    latent) and "k_rope" (B, S, 1, rope; open-mythos repeats it for every head), or "k" and "v".
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

        Rows that share memory, as after `expand`, get memory of their own.

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
        for name, kept in self.tensors.items():
            if any(step == 0 and size > 1 for step, size in zip(kept.stride(), kept.shape)):
                self.tensors[name] = kept.contiguous()
        needed = max(self.lengths) + tokens
        if self.tensors and needed <= self.capacity:
            return
        # Doubling keeps the cost of growth constant per token.
        capacity = max(needed, 2 * self.capacity) if self.tensors else max(needed, self._wanted)
        used = max(self.lengths)
        for name, new in like.items():
            # Zeros, not garbage: a masked NaN behind a row's end would still spread.
            grown = new.new_zeros(new.shape[0], capacity, *new.shape[2:])
            if name in self.tensors:
                grown[:, :used] = self.tensors[name][:, :used]
            self.tensors[name] = grown

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        """Writes new tokens (B, T, ...) behind the last one of each row.

        Returns:
            For each argument all tokens now held, (B, S, ...) with S the longest row. Gradients reach the new tokens,
            not those cached before.
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
                # A copy: autograd may save it, and the next call writes into the cache.
                seen = (
                    torch.cat((seen[:, : start[0]], value), dim=1)
                    if rows is None
                    else seen.index_put((rows, places), value)
                )
            out.append(seen)
        self.lengths = [n + tokens for n in start]
        return tuple(out)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drops the tokens behind the first `lengths[b]` of every row b."""
        if len(lengths) != len(self.lengths) or any(not 0 <= n <= h for n, h in zip(lengths, self.lengths)):
            raise ValueError(f"lengths = {list(lengths)}: must be per row within what the cache holds, {self.lengths}")
        self.lengths = list(lengths)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def _signature(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """What must not change between calls, by name: (batch, shape per token, dtype, device)."""
    return {name: (t.shape[0], tuple(t.shape[2:]), t.dtype, t.device) for name, t in tensors.items()}


class KVCache(dict):
    """The caches of a whole model: `cache key -> LayerCache`, and for loops that freeze one `RaggedCache`.

    Args:
        capacity: tokens per row to allocate at first use; longer rows make an entry double.
        loops: what a looped layer keeps of a token: "each" is a latent of every loop that it ran, "last" the latest
            alone, and a number k as many, of which loop t overwrites number t mod k. Only "each" gives what the model
            computes without a cache: with the others later loops find latents of other loops than their own.

    Raises:
        ValueError: loops is none of these.
    """

    def __init__(self, capacity: int = 0, loops: str | int = "each"):
        super().__init__()
        self.capacity = capacity
        kept = {"each": None, "last": 1}.get(loops, 0) if isinstance(loops, str) else whole_number(loops)
        if (kept is not None and kept < 1) or (kept is None and loops != "each"):
            raise ValueError(f'loops = {loops!r}: must be "each", "last" or an integer >= 1')
        self.kept_loops: int | None = kept

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row; empty before the first use."""
        return cached_lengths(self)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drops the tokens behind the first `lengths[b]` of every row b, in every entry."""
        for entry in self.values():
            entry.truncate([min(n, held) for n, held in zip(lengths, entry.lengths)])

    def nbytes(self) -> int:
        """Bytes allocated by all entries."""
        return sum(entry.nbytes() for entry in self.values())


@overload
def layer_cache(
    kv_cache: dict, key: str, taken_over: Callable[[dict], dict[str, Tensor]] | None = None
) -> LayerCache: ...


@overload
def layer_cache(kv_cache: None, key: str, taken_over: Callable[[dict], dict[str, Tensor]] | None = None) -> None: ...


@overload
def layer_cache(
    kv_cache: dict | None, key: str, taken_over: Callable[[dict], dict[str, Tensor]] | None = None
) -> LayerCache | None: ...


def layer_cache(
    kv_cache: dict | None, key: str, taken_over: Callable[[dict], dict[str, Tensor]] | None = None
) -> LayerCache | None:
    """The entry of one attention layer, created at first use; None without a cache.

    Args:
        taken_over: converts the dict of tensors that open-mythos keeps for the layer to a LayerCache's tensors.
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
    """Tokens held per row, read from the fullest entry: layers outside the loop see every token."""
    if not kv_cache:
        return []
    return max((held_lengths(entry) for entry in kv_cache.values()), key=sum)


def kept_loops(kv_cache: dict | None) -> int | None:
    """How many latents of a token each looped layer keeps; None for one of every loop."""
    return getattr(kv_cache, "kept_loops", None)


def ragged_cache(kv_cache: dict) -> RaggedCache:
    """The entry of the looped layers of a model that freezes, created at first use."""
    if RAGGED_KEY not in kv_cache:
        kv_cache[RAGGED_KEY] = RaggedCache(kept_loops(kv_cache))
    return kv_cache[RAGGED_KEY]


def reopen(kv_cache: dict, key: str, tokens: int) -> None:
    """Drops the newest `tokens` of each row in the entries of one loop: the next loop overwrites them."""
    for name, entry in kv_cache.items():
        if name == key or name.startswith(key + "."):
            entry.truncate([n - tokens for n in held_lengths(entry)])


def check_cache(kv_cache: dict, start: Sequence[int], n_loops: int, freezes: bool = False) -> None:
    """Checks that `start` continues the cache, and that the cache has entries for every loop to be run.

    Args:
        freezes: whether halted positions freeze in this call.

    Raises:
        ValueError: naming start_pos, n_loops or kv_cache.
    """
    held = cached_lengths(kv_cache) or [0] * len(start)
    if list(start) != held:
        raise ValueError(
            f"start_pos = {list(start)}: the kv_cache holds {held} tokens per row; decoding continues there"
        )
    if not any(held):
        return
    ragged = kv_cache.get(RAGGED_KEY)
    kept, depth = kept_loops(kv_cache), 0
    if freezes != (ragged is not None):
        raise ValueError(
            f"kv_cache: was filled by a model whose halted positions {'freeze' if ragged is not None else 'evolve'}: "
            "must be continued in the same way (halting and exit)"
        )
    if ragged is not None:
        depth = ragged.depth or 0
    while (
        ragged is None
        and (entry := kv_cache.get(LOOP_KEY.format(depth)) or kv_cache.get(LOOP_KEY.format(depth) + ".0")) is not None
    ):
        if held_lengths(entry) != held:
            break
        depth += 1
    if n_loops > depth and depth != kept:
        raise ValueError(
            f"n_loops = {n_loops}: the kv_cache was filled with {depth} loops; "
            "later loops would find no keys of earlier tokens. Prefill with at least as many loops."
        )
