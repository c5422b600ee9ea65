"""`openmythos::moe_experts_backward_rows` and `moe_experts_weights`: routed weights' gradients once for several calls.

A loop calls the same experts several times. With these ops the backward of a call keeps the rows that the weights'
gradients are products of, and one product over the rows of all calls makes them at the end: the gradients are written
once and, in bfloat16, rounded once. It costs the memory of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.moe.experts import WEIGHTS
from openmythos_kernels.ops.op import Op

Lists = list[list[Tensor]]


class Rows(NamedTuple):
    """What the gradients of routed weights are products of, of some or all calls; their rows lie one after the other.

    Attributes:
        x, dy: (T, D), the calls' tokens. dpre: (2 * T * K, I), of each call first the gate's, then the up's.
        act: (T * K, I). offsets: (calls, E + 1) and pair: (T * K,), int32, of each call's `Order`.
    """

    x: Tensor
    dy: Tensor
    dpre: Tensor
    act: Tensor
    offsets: Tensor
    pair: Tensor

    @staticmethod
    def empty(like: Tensor, calls: int, tokens: int, experts: int, k: int, inner: int) -> Rows:
        """Memory for `calls` calls with `tokens` tokens in all, of the dtype and on the device of `like`."""
        pairs, dim = tokens * k, like.shape[1]
        return Rows(
            like.new_empty(tokens, dim),
            like.new_empty(tokens, dim),
            like.new_empty(2 * pairs, inner),
            like.new_empty(pairs, inner),
            like.new_empty(calls, experts + 1, dtype=torch.int32),
            like.new_empty(pairs, dtype=torch.int32),
        )

    @staticmethod
    def bytes(like: Tensor, tokens: int, k: int, inner: int) -> int:
        """The size of such memory, without the indices."""
        return tokens * (2 * like.shape[1] + 3 * k * inner) * like.element_size()

    def part(self, calls: int | slice, first: int, end: int, k: int) -> Rows:
        """Those of the tokens [first, end), which are those of `calls`."""
        return Rows(
            self.x[first:end],
            self.dy[first:end],
            self.dpre[2 * first * k : 2 * end * k],
            self.act[first * k : end * k],
            self.offsets[calls],
            self.pair[first * k : end * k],
        )


# dshared: memory of the shared experts' gradients, which are filled, or with `add` added to; empty: not needed.
BACKWARD_ROWS = Op(
    f"moe_experts_backward_rows(Tensor dy, Tensor x, Tensor expert_idx, Tensor topk_weights, {WEIGHTS},"
    " Tensor saved_routed, Tensor saved_shared, bool need_x, bool add, Tensor(a!)[] dshared_gate,"
    " Tensor(b!)[] dshared_up, Tensor(c!)[] dshared_down, Tensor(d!) dpre, Tensor(e!) act, Tensor(f!) offsets,"
    " Tensor(g!) pair) -> (Tensor dx, Tensor dtopk_weights)",
    fake=lambda dy, x, expert_idx, topk_weights, *rest: (
        x.new_empty(x.shape if rest[8] else (0,)),
        topk_weights.new_empty(topk_weights.shape),
    ),
    triton="openmythos_kernels.ops.moe.launch.experts:backward_rows",
)


def _fake_weights(x, dy, dpre, act, offsets, pair, tokens, like):
    experts, inner = offsets.shape[1] - 1, act.shape[1]
    up, down = (inner, x.shape[1]), (x.shape[1], inner)
    return tuple([like.new_empty(shape) for _ in range(experts)] for shape in (up, up, down))


# tokens: of each call. The gradients have the dtype of `like` and are views of one tensor a list.
WEIGHTS_ONCE = Op(
    "moe_experts_weights(Tensor x, Tensor dy, Tensor dpre, Tensor act, Tensor offsets, Tensor pair, int[] tokens,"
    " Tensor like) -> (Tensor[] dw_gate, Tensor[] dw_up, Tensor[] dw_down)",
    fake=_fake_weights,
    triton="openmythos_kernels.ops.moe.launch.once:weights",
)


class Once:
    """One backward pass over several calls of the same experts.

    Args:
        weights: the six lists of `moe_experts`.
        x: of any call. calls, tokens: how many calls there are, and their tokens, in all. k: experts of a token.
        like: a routed weight of the dtype that the routed gradients are to have.
        shared_wanted: whether the shared experts' gradients are wanted.
    """

    def __init__(self, weights: Lists, x: Tensor, calls: int, tokens: int, k: int, like: Tensor, shared_wanted: bool):
        self._weights, self._k, self._like = weights, k, like
        self._rows = Rows.empty(x, calls, tokens, len(weights[0]), k, len(weights[0][0]))
        self._tokens: list[int] = []
        # One tensor a list, as the kernels that add to them expect.
        self._shared = [
            list(ws[0].new_empty(len(ws), *ws[0].shape)) if ws and shared_wanted else [] for ws in weights[3:]
        ]

    def add(self, dy: Tensor, x: Tensor, expert_idx: Tensor, topk_weights: Tensor, pre: list[Tensor], need_x: bool):
        """dx and dtopk_weights of a call; its rows are kept."""
        first, again = sum(self._tokens), bool(self._tokens)
        rows = self._rows.part(len(self._tokens), first, first + len(x), self._k)
        self._tokens.append(len(x))
        rows.x.copy_(x)
        rows.dy.copy_(dy)
        return BACKWARD_ROWS(
            dy, x, expert_idx, topk_weights, *self._weights, *pre, need_x, again, *self._shared, *rows[2:]
        )

    def gradients(self) -> Lists:
        """One list a list of weights; empty lists for shared experts whose gradients are not wanted."""
        rows = self._rows.part(slice(len(self._tokens)), 0, sum(self._tokens), self._k)
        routed = WEIGHTS_ONCE(*rows, self._tokens, self._like)
        return [*map(list, routed), *self._shared]
