"""Sequences under way: what every layer keeps of their tokens, and the passes that tokens take through a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from openmythos.ragged import RaggedCache
from openmythos_kernels.ops.layer import block_rows, linear_rows, loop_rows
from openmythos_kernels.ops.norm import rms_norm
from openmythos_kernels.serve.rows import Rows, Tokens
from openmythos_kernels.serve.weights import Weights


class Sequences:
    """`count` sequences of a model. Each begins empty and may be emptied at any time.

    A token takes three passes: `enter` (embedding and prelude), `loop` until it halts, `leave` (coda). Each pass takes
    tokens of any sequences together. Tokens of one sequence may share a pass, and none may precede an earlier one. No
    bit of a token's result depends on what else is in a pass.

    Args:
        keep: as of `openmythos.ragged.RaggedCache`, for the looped layers.

    Attributes:
        looped: the cache of the looped layers. A token under way has rows for all loops that it may run.
        outer: that of prelude and coda, with one row a token.
    """

    def __init__(self, weights: Weights, count: int, keep: int | None = None):
        self.weights, self.keep = weights, keep or 0
        self.looped, self.outer = RaggedCache(keep), RaggedCache()
        outside = {"prelude": len(weights.prelude), "coda": len(weights.coda)}
        names = [f"{place}_{i}" for place, n in outside.items() for i in range(n)]
        empty = torch.empty(0, dtype=weights.dtype, device=weights.device)
        for cache, layers in ((self.looped, [f".{i}" for i in range(weights.cores)]), (self.outer, names)):
            cache.start(count, weights.device)
            for layer in layers:
                cache.pool(layer, latent=empty.new_empty(0, weights.latent), k_rope=empty.new_empty(0, weights.rope))

    def append(self, sequences: Sequence[int], tokens: int, loops: Sequence[int]) -> None:
        """Room for `tokens` more of each of some sequences, which may run `loops[i]` loops each."""
        self.looped.extend([[n - 1] * tokens for n in loops], sequences)
        self.outer.extend([[0] * tokens for _ in loops], sequences)

    def enter(self, ids: Tensor, tokens: Tokens) -> Tensor:
        """ids (N,) -> the prelude's output (N, D)."""
        x = self.weights.embed[ids]
        return self._outside("prelude", self.weights.prelude, x, tokens)

    def initial(self, e: Tensor) -> Tensor:
        """The state before the first loop, (N, D)."""
        return torch.zeros_like(e) if self.weights.h0 == "zeros" else e

    def loop(self, rows: Rows, limit: Tensor, deepest: int, *, act: bool, freeze: bool, loops: int = 1) -> None:
        """Up to `loops` loops of the rows that have some left; see `loop_rows`.

        Args:
            limit: (N,), in place of `rows.limit`. deepest: its maximum, or more.
        """
        weights, pools = self.weights, self.looped.pools.values()
        loop_rows(
            rows.h,
            rows.e,
            rows.h_out,
            rows.cumulative_p,
            rows.ponder,
            rows.running,
            rows.loop,
            limit,
            rows.angles,
            rows.sequence,
            rows.position,
            self.looped.first,
            self.looped.last,
            [pool["latent"] for pool in pools],
            [pool["k_rope"] for pool in pools],
            weights.core,
            weights.lora,
            weights.step,
            weights.embeddings(deepest),
            keep=self.keep,
            freeze=freeze,
            act=act,
            loops=loops,
            **weights.options,
        )

    def leave(self, out: Tensor, tokens: Tokens) -> Tensor:
        """The loop's output (N, D) -> the final norm's input (N, D)."""
        return self._outside("coda", self.weights.coda, out, tokens)

    def logits(self, x: Tensor) -> Tensor:
        """The final norm's input (N, D) -> logits (N, vocab)."""
        norm = self.weights.norm
        return linear_rows(rms_norm(x, norm.weight, norm.eps), self.weights.head)

    def settle(self, sequence: int, start: int, loops: Sequence[int], limit: int) -> None:
        """The newest tokens of a sequence, from `start` on, ran `loops` loops of `limit`: gives back what they left."""
        room = [self._room(n) for n in loops]
        if min(room) == self._room(limit):
            return
        cache, last = self.looped, [n - 1 for n in loops]
        if len(loops) == 1:
            cache.settle(last, [sequence])
            return
        old = self._rows_of(sequence, start, room)
        held = {layer: {name: x[old] for name, x in pool.items()} for layer, pool in cache.pools.items()}
        _cut(cache, sequence, start)
        cache.extend([last], [sequence])
        new = self._rows_of(sequence, start, room)
        for layer, values in held.items():
            cache.put(layer, new, **values)

    def truncate(self, sequence: int, tokens: int) -> None:
        """Drops all tokens of a sequence but the first `tokens`."""
        _cut(self.looped, sequence, tokens)
        _cut(self.outer, sequence, tokens)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.looped.nbytes() + self.outer.nbytes()

    def _room(self, loops: int) -> int:
        """Rows of a token that ran so many loops."""
        return min(loops, self.keep) if self.keep else loops

    def _rows_of(self, sequence: int, start: int, room: Sequence[int]) -> Tensor:
        """Every row of the tokens from `start` on, which have room[i] rows."""
        first = self.looped.first[sequence, start : start + len(room)].tolist()
        rows = chain.from_iterable(range(row, row + n) for row, n in zip(first, room))
        return torch.tensor(list(rows), device=self.weights.device)

    def _outside(self, name: str, blocks: Sequence, x: Tensor, tokens: Tokens) -> Tensor:
        """Tokens through the blocks before or behind the loop."""
        cache = self.outer
        angles, loop = self.weights.angles[tokens.position], torch.zeros_like(tokens.position)
        for i, block in enumerate(blocks):
            pool = cache.pools[f"{name}_{i}"]
            x, _ = block_rows(
                x,
                angles,
                tokens.sequence,
                tokens.position,
                loop,
                cache.first,
                cache.last,
                pool["latent"],
                pool["k_rope"],
                block,
            )
        return x


def _cut(cache: RaggedCache, sequence: int, tokens: int) -> None:
    lengths = list(cache.lengths)
    lengths[sequence] = tokens
    cache.truncate(lengths)
