"""`openmythos::loop_rows`: independent tokens through loops of a recurrent block, each from a loop of its own on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from openmythos_kernels.ops.layer import formula
from openmythos_kernels.ops.layer.weights import BLOCK_SCHEMA, BlockWeights
from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime.backends import choose


def loop_rows(
    h: Tensor,
    e: Tensor,
    h_out: Tensor,
    cumulative_p: Tensor,
    ponder: Tensor,
    running: Tensor,
    loop: Tensor,
    limit: Tensor,
    freqs: Tensor,
    sequence: Tensor,
    position: Tensor,
    first: Tensor,
    last: Tensor,
    latents: Sequence[Tensor],
    k_ropes: Sequence[Tensor],
    blocks: BlockWeights,
    lora: Sequence[Tensor],
    step: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    *,
    keep: int = 0,
    eps: float,
    threshold: float,
    spend_remainder: bool,
    residual: bool,
    freeze: bool,
    act: bool = True,
    loops: int = 1,
) -> Tensor:
    """Up to `loops` times one loop of `openmythos.RecurrentBlock` for the rows with loops left; stops if there is none.

    A row has loops left while loop < limit, and with `freeze` only while it runs. Others are not computed. A loop sets
    last[s, p] = loop, writes the latents of each block (see `block_rows`), updates h, h_out and ACT's state, and adds 1
    to `loop`. A row whose state is NaN halts.

    Without gradients. On a CPU no bit of a row's results depends on the other rows or on the number of threads.

    Args:
        h, h_out: (N, D), written. e: (N, D), the input that each loop injects.
        cumulative_p, ponder: (N,) float32 (float64 for float64 h), written.
        running: (N,) bool, written. loop: (N,) int64, each row's next loop, written.
        limit: (N,) int64, the loops that a row may run in all.
        freqs, sequence, position, first: as of `block_rows`; `first` leaves room for `limit` loops.
        last: as of `block_rows`, written.
        latents, k_ropes: the pools of each looped block, written.
        blocks: the weights of the looped blocks.
        lora: `LoraWeights` or a list in its order; or nothing. Loops past the last scale use it.
        step: `StepWeights` or a list in its order.
        embeddings: of each loop's number, (n,) with n <= D; for at least max(limit) loops.
        keep: as of `block_rows`.
        eps: of the norm at a loop's start.
        threshold: a row halts once its cumulative_p reaches it.
        spend_remainder: whether rows that still run spend their remainder in loop limit - 1.
        residual: whether to inject what the blocks added to their input, instead of their output.
        freeze: whether a halted row stops.
        act: whether halting is computed. Else h_out = h, and cumulative_p, ponder and running stay as they are.
        loops: loops at most in this call.

    Returns:
        The tokens that each expert of each block saw, (blocks, E) int64; (blocks, 0) with dense FFNs.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    state = h, e.contiguous(), h_out, cumulative_p, ponder, running, loop
    rows = limit.contiguous(), freqs.contiguous(), sequence.contiguous(), position.contiguous(), first, last
    options: Any = keep, eps, threshold, spend_remainder, residual, freeze, act, loops
    if not choose("loop_rows", h.device.type).fast:
        return formula.loop_rows(*state, *rows, latents, k_ropes, blocks, lora, step, embeddings, *options)
    return LOOP_ROWS(*state, *rows, latents, k_ropes, *blocks, lora, step, embeddings, *options)


def _fake(h, *rest):
    latents, loop = rest[_LATENTS], rest[_LOOP]
    blocks = BlockWeights(*rest[_LATENTS + 2 : _LATENTS + 2 + len(BlockWeights._fields)])
    return loop.new_empty(len(latents), len(blocks.gate) // len(latents))


_LOOP, _LATENTS = 5, 12  # places behind h

LOOP_ROWS = Op(
    "loop_rows(Tensor(a!) h, Tensor e, Tensor(b!) h_out, Tensor(c!) cumulative_p, Tensor(d!) ponder, "
    "Tensor(e!) running, Tensor(f!) loop, Tensor limit, Tensor freqs, Tensor sequence, Tensor position, Tensor first, "
    f"Tensor(g!) last, Tensor(h!)[] latents, Tensor(i!)[] k_ropes, {BLOCK_SCHEMA}, Tensor[] lora, Tensor[] step, "
    "Tensor[] embeddings, int keep, float norm_eps, float threshold, bool spend_remainder, bool residual, bool freeze, "
    "bool act, int loops) -> Tensor load",
    fake=_fake,
)
