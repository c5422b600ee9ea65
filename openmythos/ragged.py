"""The ragged cache: what looped layers keep of tokens that ran different numbers of loops.

A token that halted in loop tau keeps tau + 1 latents in every looped layer, in consecutive rows of the layer's pool.
All layers share one table: token j of sequence b begins at row `first[b, j]` and ran `last[b, j] + 1` loops. What loop
t reads of it is row `first + min(t, last)`: the latent of loop t, or of the loop in which the token halted.

Rows are handed out in pages. A page belongs to one sequence, and no token crosses a page, so that its rows stay
consecutive and pages of a truncated sequence are free at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RAGGED_KEY = "recurrent"
# Rows of a page. A token needs a row per loop; longer pages would waste more at the end of short sequences.
PAGE = 128
# A pool that is too small grows by at least this share of itself: what it allocates too much stays small.
GROWTH = 1 / 8


class RaggedCache:
    """The entries of all looped layers of one recurrent block.

    Args:
        keep: latents that a token keeps per layer; None: one for every loop that it ran. With k, loop t writes slot
            t mod k, and what was in it is lost.

    Attributes:
        pools: layer -> name -> (rows, ...). Latent attention keeps "latent" and "k_rope", GQA "k" and "v", each as in a
            `LayerCache`. A layer is named by what distinguishes it inside the loop: "" or ".0", ".1", ...
        first, last: (B, capacity) int32, the table.
        lengths: tokens held by each sequence.
        depth: loops that the shallowest call allowed. Deeper ones would find no latents of its tokens.
    """

    def __init__(self, keep: int | None = None):
        self.keep = keep
        self.pools: dict[str, dict[str, Tensor]] = {}
        self.first = self.last = torch.zeros(0, 0, dtype=torch.int32)
        self.lengths: list[int] = []
        self.depth: int | None = None
        self._pages: list[list[int]] = []  # of each sequence, in the order of its tokens
        self._used: list[int] = []  # rows used of each sequence's newest page
        self._newest: list[tuple[int, int] | None] = []  # each sequence's newest token as `extend` made it: first, last
        self._free: list[int] = []
        self._count = 0  # pages that exist
        self._page = PAGE

    @property
    def rows(self) -> int:
        """Rows of each pool."""
        return self._count * self._page

    @property
    def free_rows(self) -> int:
        """Rows of pages that belong to no sequence."""
        return len(self._free) * self._page

    def slot(self, t: int) -> int:
        """Where loop t's latent lies behind a token's first row."""
        return t % self.keep if self.keep else t

    def start(self, batch: int, device: torch.device) -> None:
        """Makes the table of an empty cache; one that is in use must have this many sequences.

        Raises:
            ValueError: it holds another number of sequences.
        """
        if not self.lengths:
            self.lengths = [0] * batch
            self._pages, self._used, self._newest = [[] for _ in range(batch)], [0] * batch, [None] * batch
            self.first = self.last = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        elif len(self.lengths) != batch:
            raise ValueError(f"kv_cache: holds {len(self.lengths)} sequences, the call has {batch}: must be as many")

    def extend(self, last: Tensor | Sequence[Sequence[int]], sequences: Sequence[int] | None = None) -> None:
        """Appends tokens and gives them rows. Their latents are written afterwards, by `put`.

        Args:
            last: (B, T), the last loop that each new token ran (or will run at most: see `settle`).
            sequences: which sequences the B rows of `last` are; None means all.
        """
        device = self.first.device
        numbers = last.tolist() if isinstance(last, Tensor) else [list(row) for row in last]
        if not numbers or not numbers[0]:
            return
        places = list(range(len(self.lengths))) if sequences is None else list(sequences)
        tokens = len(numbers[0])
        self._widen(max(self.lengths[b] for b in places) + tokens)
        pages = self._count
        firsts = [[self._take(b, self._rows_of(n)) for n in row] for b, row in zip(places, numbers)]
        if len(places) == tokens == 1:  # decoding: writing two numbers takes a third of the time
            at: tuple = (places[0], self.lengths[places[0]])
            self.first[at], self.last[at] = firsts[0][0], numbers[0][0]
        else:
            held = torch.tensor([[b, self.lengths[b]] for b in places], device=device)
            at = held[:, :1], held[:, 1:] + torch.arange(tokens, device=device)
            self.first[at] = torch.tensor(firsts, dtype=torch.int32, device=device)
            self.last[at] = torch.tensor(numbers, dtype=torch.int32, device=device)
        for b, first, ran in zip(places, firsts, numbers):
            self.lengths[b] += tokens
            self._newest[b] = first[-1], ran[-1]
        if self._count > pages:
            self._grow()

    def settle(self, last: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """The newest token of each sequence ran fewer loops than `extend` allowed: gives back the rows behind it."""
        places = range(len(self.lengths)) if sequences is None else sequences
        for b, n in zip(places, last):
            j = self.lengths[b] - 1
            first, allowed = self._newest[b] or (int(self.first[b, j]), int(self.last[b, j]))
            given, ran = self._rows_of(allowed), self._rows_of(n)
            end = first % self._page + given
            if end == self._used[b]:  # it is the last one of its page
                self._used[b] -= given - ran
            self.last[b, j] = n
            self._newest[b] = first, n

    def row(self, t: int, tokens: slice = slice(None)) -> Tensor:
        """(B, S) int64: the row that loop t reads of each token, of the `tokens` of the longest sequence's."""
        longest = max(self.lengths, default=0)
        first, last = self.first[:, :longest][:, tokens].long(), self.last[:, :longest][:, tokens].long()
        at = last.clamp(max=t)
        return first + (at % self.keep if self.keep else at)

    def put(self, layer: str, rows: Tensor, **values: Tensor) -> None:
        """Writes values (N, ...) to rows (N,) of a layer's pool."""
        pool = self.pool(layer, **values)
        for name, value in values.items():
            pool[name].index_copy_(0, rows, value.detach().to(pool[name].dtype))

    def pool(self, layer: str, **like: Tensor) -> dict[str, Tensor]:
        """A layer's pool, made at its first use for values like these (N, ...)."""
        if layer not in self.pools:
            self.pools[layer] = {name: x.new_zeros(self.rows, *x.shape[1:]) for name, x in like.items()}
        return self.pools[layer]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drops the tokens behind the first `lengths[b]` of every sequence b; pages without tokens are free then."""
        if len(lengths) != len(self.lengths) or any(not 0 <= n <= h for n, h in zip(lengths, self.lengths)):
            raise ValueError(f"lengths = {list(lengths)}: must be per row within what the cache holds, {self.lengths}")
        for b, (n, held) in enumerate(zip(lengths, self.lengths)):
            if n == held:
                continue
            kept, self._newest[b] = 0, None
            if n:
                row, given = int(self.first[b, n - 1]), self._rows_of(int(self.last[b, n - 1]))
                kept = self._pages[b].index(row // self._page) + 1
                self._used[b] = row % self._page + given
            self._free += self._pages[b][kept:]
            self._free.sort(reverse=True)
            del self._pages[b][kept:]
        self.lengths = list(lengths)

    def nbytes(self) -> int:
        """Bytes allocated: pools and table."""
        tensors = [x for pool in self.pools.values() for x in pool.values()] + [self.first, self.last]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _rows_of(self, last: int) -> int:
        return min(last + 1, self.keep) if self.keep else last + 1

    def _take(self, b: int, rows: int) -> int:
        """The first of consecutive rows for the next token of sequence b."""
        if rows > self._page:
            if self._count:
                raise ValueError(f"n_loops = {rows}: a token of this cache keeps at most {self._page} loops")
            self._page = rows
        if not self._pages[b] or self._used[b] + rows > self._page:
            if not self._free:
                self._free.append(self._count)
                self._count += 1
            self._pages[b].append(self._free.pop())
            self._used[b] = 0
        row = self._pages[b][-1] * self._page + self._used[b]
        self._used[b] += rows
        return row

    def _widen(self, tokens: int) -> None:
        """Room in the table for so many tokens of a sequence."""
        batch, capacity = self.first.shape
        if tokens > capacity:
            added = self.first.new_zeros(batch, max(tokens, 2 * capacity) - capacity)
            self.first, self.last = torch.cat((self.first, added), 1), torch.cat((self.last, added), 1)

    def _grow(self) -> None:
        """Room in the pools for all pages that exist."""
        for pool in self.pools.values():
            for name, held in pool.items():
                if len(held) < self.rows:
                    wanted = max(self.rows, int(len(held) * (1 + GROWTH)) // self._page * self._page)
                    pool[name] = torch.cat((held, held.new_zeros(wanted - len(held), *held.shape[1:])))
        longest = max((len(x) for pool in self.pools.values() for x in pool.values()), default=0)
        while self._count * self._page < longest:
            self._free.insert(0, self._count)
            self._count += 1
