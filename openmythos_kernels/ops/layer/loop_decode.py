"""`openmythos::loop_decode`: one token per row through all loops of a recurrent block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.layer.block_decode import WEIGHTS, BlockWeights
from openmythos_kernels.ops.op import Op


class LoopDecode(NamedTuple):
    h_out: Tensor  # (B, D): ACT's weighted sum of the states
    ponder: Tensor  # (B,) float32 (float64 for float64): loops run plus remainder
    expert_idx: Tensor  # (loops * blocks, B, topk) int64, in the order in which blocks run; topk = 0 with dense FFNs


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
) -> LoopDecode:
    """All loops of `openmythos.RecurrentBlock` with halting="evolve" and a cache; appends to every loop's cache.

    Inference only: nothing here has a gradient. CPU only.

    Args:
        h, e: (B, D): state before the first loop, and what every loop injects.
        freqs, lengths: as of `openmythos_kernels.ops.mla.decode`.
        latent_caches, rope_caches: one for each loop and block, (loop 0, block 0), (loop 0, block 1), ...
        blocks: the weights of what is looped.
        lora: down (rank, D), scale (depths, rank), B (rank, D); or nothing. Loops past the last scale use it.
        step: log_A (D,), log_dt (1,), B (D,), halt_weight (1, D), halt_bias (1,), norm_weight (D,).
        embeddings: of each loop's number, (n,) with n <= D.
        eps: of the norm that enters a loop.
        threshold: a position halts once its halting probabilities add up to this.
        spend_remainder: whether the last loop spends all that is left.
        residual: whether only what the blocks added to their input is injected.

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
        )
    )


def _fake(h, e, freqs, lengths, latent_caches, rope_caches, attention, router, *rest):
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    topk = rest[6] if router else 0
    return (
        torch.empty_like(h),
        h.new_empty(h.shape[:1], dtype=wide),
        lengths.new_empty(len(latent_caches), h.shape[0], topk),
    )


LOOP_DECODE = Op(
    "loop_decode(Tensor h, Tensor e, Tensor freqs, Tensor lengths, Tensor(a!)[] latent_caches, Tensor(b!)[] rope_caches, "
    f"{WEIGHTS}, Tensor[] lora, Tensor[] step, Tensor[] embeddings, float norm_eps, float threshold, bool spend_remainder, "
    "bool residual) -> (Tensor h_out, Tensor ponder, Tensor expert_idx)",
    fake=_fake,
)
