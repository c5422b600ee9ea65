"""What the loops of one layer hand on to each other in training: keys, and on the way back their gradients.

The backward needs the keys and values of all positions as each loop saw them. It walks from the last loop to the first
and puts back, in each, those of the loop's rows. Gradients of keys go from loop to loop: what a loop's attention gives
is added to what later loops gave, and each row's sum leaves in the loop that made it. So every row has one owner, sums
have one order, and runs give the same bits.

Between loops the gradients travel along carriers: tensors of the keys' shapes without memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from openmythos_kernels.nn.packed import PackedKeys

Made = tuple[Tensor, ...]  # a loop's places in the buffers, (n,), and what it keeps of each of these rows, (n, ...)
KeysOf = Callable[..., tuple[Tensor, Tensor]]  # kv and k_rope of what is kept of some rows


class Walk:
    """One layer's loops in one forward. A graph must not hold it, as it holds results of the graph: such a cycle would
    never be freed.

    Args:
        by: the autograd.Function that computes these loops. What one keeps, another could not read.

    Attributes:
        frozen: made by loops without gradients.
        made: by every other loop so far.
        carriers: of the keys and values, and of the rotary keys, after the last loop so far.
        buffers: what the graph may hold.
    """

    def __init__(self, keys: PackedKeys, by: type):
        self.by = by
        self.frozen: list[Made] = []
        self.made: list[Made] = []
        self.carriers: Sequence[Tensor | None] = (None, None)
        self.buffers = KeyBuffers(keys.batch, keys.keys)

    @classmethod
    def of(cls, keys: PackedKeys, layer: str, by: type) -> Walk:
        """The walk of the layer with this name.

        Raises:
            RuntimeError: earlier loops of this forward were computed by another function.
        """
        if layer not in keys.walks:
            keys.walks[layer] = cls(keys, by)
        walk = keys.walks[layer]
        if walk.by is not by:
            raise RuntimeError(f"{layer}: {by.__name__} after loops of {walk.by.__name__}; must be one in all loops")
        return walk


class KeyBuffers:
    """Keys and values of all positions as one loop saw them: kv (B * S, H, nope + v) and k_rope (B * S, rope). They are
    there from the first loop's forward to its backward."""

    def __init__(self, batch: int, keys: int):
        self._size, self._shape = batch * keys, (batch, keys)
        self._whole: list[Tensor] = []
        self._loop = -1

    def put(self, at: Tensor, kv: Tensor, k_rope: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """The buffers in this loop, (B, S, ...): those of the loop before, or behind it, with its rows replaced."""
        if not self._whole:
            self._whole = [x.new_zeros(self._size, *x.shape[1:]) for x in (kv, k_rope)]
        for buffer, new in zip(self._whole, (kv, k_rope)):
            buffer.index_copy_(0, at, new)
        self._loop = loop
        whole_kv, whole_rope = (x.unflatten(0, self._shape) for x in self._whole)
        return whole_kv, whole_rope

    def back(self, made: Sequence[Made], kv: Tensor, k_rope: Tensor, keys_of: KeysOf) -> tuple[Tensor, Tensor]:
        """The buffers as the last loop of `made` saw them, whose rows have these keys. After a forward they are made
        again: if keys are computed again, a second backward has the bits of the first."""
        t = len(made) - 1
        if self._loop != t + 1 or not self._whole:
            self._whole = []
            for at, *kept in self.owned(made[:-1]):
                self.put(at, *keys_of(*kept), t)
        return self.put(made[t][0], kv, k_rope, t)

    def differentiable(self, made: Sequence[Made], kv: Tensor, k_rope: Tensor, keys_of: KeysOf) -> list[Tensor]:
        """`back` by differentiable operators."""
        whole = [x.new_zeros(self._size, *x.shape[1:]) for x in (kv, k_rope)]
        owned = [(at, keys_of(*kept)) for at, *kept in self.owned(made[:-1])]
        for at, new in (*owned, (made[-1][0], (kv, k_rope))):
            whole = [old.index_copy(0, at, x) for old, x in zip(whole, new)]
        return [x.unflatten(0, self._shape) for x in whole]

    def owned(self, made: Sequence[Made]) -> Iterator[Made]:
        """The rows of `made` that no later loop of it replaces."""
        if not made:
            return
        owner = made[0][0].new_full((self._size,), -1)
        for t, (at, *_) in enumerate(made):
            owner[at] = t
        for t, (at, *kept) in enumerate(made):
            if not len(at):  # the row that stays for other ranks
                continue
            mine = owner[at] == t
            yield at[mine], *(x[mine] for x in kept)

    def carry(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """New carriers for keys like these rows."""
        return (x.new_zeros(()).expand(self._size, *x.shape[1:]) for x in rows)

    def leave(
        self, at: Tensor, mine: Sequence[Tensor | None], later: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of a loop's rows, and of the keys that earlier loops made.

        Args:
            at: the places of the loop's rows.
            mine: what the loop's attention gives to kv and k_rope, (B, S, ...); None is zeros.
            later: what later loops gave, (B * S, ...); None is zeros. Without a graph it is summed in place, as nobody
                else holds it.
            like: kv and k_rope, (n, ...).
        """
        graph = torch.is_grad_enabled()
        sums = [self._sum(*some, graph) for some in zip(mine, later, like)]
        rows = [total.index_select(0, at) for total in sums]
        return rows, [total.index_fill(0, at, 0.0) if graph else total.index_fill_(0, at, 0.0) for total in sums]

    def _sum(self, mine: Tensor | None, theirs: Tensor | None, like: Tensor, graph: bool) -> Tensor:
        mine = None if mine is None else mine.flatten(0, 1)
        if mine is None or theirs is None:
            found = theirs if mine is None else mine
            return like.new_zeros(self._size, *like.shape[1:]) if found is None else found
        return theirs + mine if graph else theirs.add_(mine)

    def drop(self) -> None:
        """Frees the buffers."""
        self._whole, self._loop = [], -1
