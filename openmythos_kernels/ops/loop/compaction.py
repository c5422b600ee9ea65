"""The running positions as index lists on the device, and rows gathered from and scattered to them.

The host reads nothing: shapes follow from the inputs' shapes, and lists are padded with -1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.op import LIBRARY, Op


class Active(NamedTuple):
    """The running positions of a batch of B sequences of T positions; all int64.

    Attributes:
        index: (B * T,): the numbers b * T + t of the running positions in ascending order, then -1.
        last: (B,): the last running position of each sequence, -1 where none runs. With causal attention no later
            position is needed.
        counts: (B,): the number of running positions of each sequence.
        total: (1,): the number of running positions in the batch.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    last: Tensor
    counts: Tensor
    total: Tensor


def compact_active(running: Tensor) -> Active:
    """Lists the running positions.

    Args:
        running: (B, T) bool.

    Raises:
        ValueError: running's shape or dtype is not as above.
    """
    if running.dtype != torch.bool or running.dim() != 2:
        raise ValueError(f"running: got {running.dtype} of shape {tuple(running.shape)}, expected bool of shape (B, T)")
    return Active(*COMPACT_ACTIVE(running.contiguous()))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row i of the result is row index[i] of x, or zeros if index[i] is outside [0, N).

    Args:
        x: (N, D), any dtype.
        index: (M,) int64; with gradients, no row twice.

    Returns:
        (M, D).

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(x, "x", index)
    return GATHER_ROWS(x.contiguous(), index.contiguous())


def scatter_rows(base: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """A copy of base whose row index[i] is rows[i]; rows[i] is dropped if index[i] is outside [0, N).

    Args:
        base: (N, D), any dtype.
        rows: (M, D) of base's dtype.
        index: (M,) int64, no row twice.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    _check(base, "base", index)
    if rows.shape != (index.shape[0], base.shape[1]) or rows.dtype != base.dtype or rows.device != base.device:
        raise ValueError(
            f"rows: got {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}, expected {base.dtype} of shape "
            f"{(index.shape[0], base.shape[1])} on {base.device}"
        )
    return SCATTER_ROWS(base.contiguous(), rows.contiguous(), index.contiguous(), base.shape[0])


def _check(x: Tensor, name: str, index: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (N, D)")
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != x.device:
        raise ValueError(
            f"index: got {index.dtype} of shape {tuple(index.shape)} on {index.device}, expected int64 of shape (M,) "
            f"on {x.device}"
        )


def _fake_compact(running):
    sequences, length = running.shape
    return tuple(running.new_empty(n, dtype=torch.int64) for n in (sequences * length, sequences, sequences, 1))


def _plain_compact(running):
    sequences, length = running.shape
    flat = running.flatten()
    count = flat.sum().reshape(1)
    order = (~flat).to(torch.uint8).argsort(stable=True)
    slot = torch.arange(flat.numel(), device=flat.device)
    position = torch.arange(1, length + 1, device=flat.device)
    furthest = torch.cat([(running * position), running.new_zeros(sequences, 1, dtype=torch.int64)], 1).amax(1)
    return torch.where(slot < count, order, -1), furthest - 1, running.sum(1), count


def _setup_gather(ctx, inputs, output):
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[0]


def _gather_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return SCATTER_ROWS(None, grad.contiguous(), index, ctx.rows), None


def _plain_gather(x, index):
    inside = (index >= 0) & (index < x.shape[0])
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    return torch.where(
        inside.unsqueeze(1), x[torch.where(inside, index, 0)], torch.zeros((), dtype=x.dtype, device=x.device)
    )


def _fake_scatter(base, rows, index, n):
    some = rows if base is None else base
    return some.new_empty(n, some.shape[1])


def _setup_scatter(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])
    ctx.given = [x is not None for x in inputs[:2]]


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    grad = grad.contiguous()
    base, rows = ctx.given
    dbase = SCATTER_ROWS(grad, None, index, grad.shape[0]) if base else None
    return dbase, GATHER_ROWS(grad, index) if rows else None, None, None


def _plain_scatter(base: Tensor | None, rows: Tensor | None, index: Tensor, n: int):
    some: Any = rows if base is None else base
    inside = (index >= 0) & (index < n)
    # One extra row takes the dropped rows.
    wide = some.new_zeros(n + 1, some.shape[1])
    if base is not None:
        wide[:n] = base
    wide[torch.where(inside, index, n)] = some.new_zeros(index.shape[0], some.shape[1]) if rows is None else rows
    return wide[:n].clone()


COMPACT_ACTIVE = Op(
    "compact_active(Tensor running) -> (Tensor index, Tensor last, Tensor counts, Tensor total)",
    fake=_fake_compact,
    formula=_plain_compact,
)
GATHER_ROWS = Op(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    fake=lambda x, index: x.new_empty(index.shape[0], x.shape[1]),
    setup_context=_setup_gather,
    backward=_gather_backward,
    formula=lambda *args: (_plain_gather(*args),),
)
# A missing base counts as zeros, and so do missing rows.
SCATTER_ROWS = Op(
    "scatter_rows(Tensor? base, Tensor? rows, Tensor index, int n) -> Tensor",
    fake=_fake_scatter,
    setup_context=_setup_scatter,
    backward=_scatter_backward,
    formula=lambda *args: (_plain_scatter(*args),),
)
# For devices without a kernel of their own.
LIBRARY.impl("compact_active", _plain_compact, "CompositeExplicitAutograd")
LIBRARY.impl("gather_rows", _plain_gather, "CompositeExplicitAutograd")
LIBRARY.impl("scatter_rows", _plain_scatter, "CompositeExplicitAutograd")
