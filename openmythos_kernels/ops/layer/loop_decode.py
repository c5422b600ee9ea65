"""`openmythos::loop_decode`: one token per row through all loops of a recurrent block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.layer.weights import BLOCK_SCHEMA, BlockWeights, experts_per_token
from openmythos_kernels.ops.op import Op


class LoopDecode(NamedTuple):
    h_out: Tensor  # (B, D): the sum of the states, weighted by halting; without halting the last state
    ponder: Tensor  # (B,) float32 (float64 for float64): ponder cost, the loops run plus the rest; 0 without halting
    expert_idx: Tensor  # (loops * blocks, B, topk) int64, in running order; topk = 0 with dense FFNs


def loop_decode(
    h: Tensor,
    e: Tensor,
    freqs: Tensor,
    lengths: Tensor,
    latent_caches: Sequence[Tensor],
    rope_caches: Sequence[Tensor],
    blocks: BlockWeights,
    lora: Sequence[Tensor],
    step: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    *,
    eps: float,
    threshold: float,
    spend_remainder: bool,
    residual: bool,
    act: bool = True,
) -> LoopDecode:
    """All loops of `openmythos.RecurrentBlock` with halting="evolve" or "off" and a cache.

    Appends to the cache of each loop.

    On a CPU, and on a GPU by Triton's kernels. No GPU has run these, so that models use them with OPENMYTHOS_UNPROVEN=1
    alone; a launch takes any number of rows, and reads each weight once for every 16. Without gradients; sums on a GPU
    are float32.

    Args:
        h, e: (B, D): the state before the first loop, and the input that each loop injects.
        freqs, lengths: as of `openmythos_kernels.ops.mla.decode`.
        latent_caches, rope_caches: one for each loop and block: (loop 0, block 0), (loop 0, block 1), ...
        blocks: the weights of the looped blocks.
        lora: `LoraWeights` or a list in its order; or nothing. Loops past the last scale use it.
        step: `StepWeights` or a list in its order.
        embeddings: of each loop's number, (n,) with n <= D.
        eps: of the norm at a loop's start.
        threshold: a position halts once its cumulative_p reaches it.
        spend_remainder: whether positions that still run spend their remainder in the last loop.
        residual: whether to inject what the blocks added to their input, instead of their output.
        act: whether halting is computed.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    return LoopDecode(
        *LOOP_DECODE(
            h.contiguous(),
            e.contiguous(),
            freqs.contiguous(),
            lengths.contiguous(),
            latent_caches,
            rope_caches,
            *blocks,
            lora,
            step,
            embeddings,
            eps,
            threshold,
            spend_remainder,
            residual,
            act,
        )
    )


def _fake(h, e, freqs, lengths, latent_caches, rope_caches, *rest):
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    topk = experts_per_token(BlockWeights(*rest[: len(BlockWeights._fields)]))
    return (
        torch.empty_like(h),
        h.new_empty(h.shape[:1], dtype=wide),
        lengths.new_empty(len(latent_caches), h.shape[0], topk),
    )


LOOP_DECODE = Op(
    "loop_decode(Tensor h, Tensor e, Tensor freqs, Tensor lengths, Tensor(a!)[] latent_caches, "
    f"Tensor(b!)[] rope_caches, {BLOCK_SCHEMA}, Tensor[] lora, Tensor[] step, Tensor[] embeddings, float norm_eps, "
    "float threshold, bool spend_remainder, bool residual, bool act) "
    "-> (Tensor h_out, Tensor ponder, Tensor expert_idx)",
    fake=_fake,
    triton="openmythos_kernels.ops.layer.launch.decode:loop_decode",
)
