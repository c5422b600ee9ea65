"""`openmythos::block_rows`: independent tokens, each in a loop of its own, through a block and a ragged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.layer import formula
from openmythos_kernels.ops.layer.weights import BLOCK_SCHEMA, BlockWeights, experts_per_token
from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime.backends import choose


def block_rows(
    x: Tensor,
    freqs: Tensor,
    sequence: Tensor,
    position: Tensor,
    loop: Tensor,
    first: Tensor,
    last: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    blocks: BlockWeights,
    *,
    keep: int = 0,
) -> tuple[Tensor, Tensor]:
    """`openmythos.TransformerBlock` for N tokens that need not be neighbours; writes their keys to the pool.

    Row n is the token at position[n] of sequence[n], in loop[n]. It writes its latent to row
    `first[s, p] + slot(loop[n])` of the pool, and attends to the tokens 0 .. p of its sequence: to token j through row
    `first[s, j] + slot(min(loop[n], last[s, j]))`. All rows write before any row attends. See `openmythos.ragged`.

    Without gradients. On a CPU no bit of a row's result depends on the other rows or on the number of threads.

    Args:
        x: (N, D), one of `ops.dtypes.FLOATS`; weights and pools have its dtype.
        freqs: (N, rope / 2, 2) float32: (cos, sin) at each row's position.
        sequence, position, loop: (N,) int64. No two rows are the same token.
        first, last: (S, C) int32, the table; last >= loop at the rows' own tokens.
        latent: (R, r), normed latents. k_rope: (R, rope), rotated keys. Dense; written in place.
        blocks: the weights of one block.
        keep: the slots of a token: slot(t) = t mod keep; 0 if it has one for each loop.

    Returns:
        (N, D), and the experts of each token, (N, topk) int64; (N, 0) with a dense FFN.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if not choose("block_rows", x.device.type).fast:
        return formula.block_rows(x, freqs, sequence, position, loop, first, last, latent, k_rope, blocks, keep)
    rows = (dense.contiguous() for dense in (x, freqs, sequence, position, loop))
    return BLOCK_ROWS(*rows, first, last, latent, k_rope, *blocks, keep)


def _fake(x, freqs, sequence, position, loop, first, last, latent, k_rope, *rest):
    topk = experts_per_token(BlockWeights(*rest[: len(BlockWeights._fields)]))
    return torch.empty_like(x), position.new_empty(x.shape[0], topk)


BLOCK_ROWS = Op(
    "block_rows(Tensor x, Tensor freqs, Tensor sequence, Tensor position, Tensor loop, Tensor first, Tensor last, "
    f"Tensor(a!) latent, Tensor(b!) k_rope, {BLOCK_SCHEMA}, int keep) -> (Tensor y, Tensor expert_idx)",
    fake=_fake,
)
