"""`openmythos::block_decode`: one token per row through a pre-norm transformer block and its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.layer.weights import BLOCK_SCHEMA, BlockWeights, experts_per_token
from openmythos_kernels.ops.op import Op


def block_decode(
    x: Tensor, freqs: Tensor, lengths: Tensor, latent_cache: Tensor, rope_cache: Tensor, block: BlockWeights
) -> tuple[Tensor, Tensor]:
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`, as `openmythos.TransformerBlock`; appends to the caches.

    On a CPU, and on a GPU by Triton's kernels. No GPU has run these, so that models use them with OPENMYTHOS_UNPROVEN=1
    alone; a launch takes any number of rows, and reads each weight once for every 16. Without gradients; sums on a GPU
    are float32.

    Args:
        x: (B, D), one of `ops.dtypes.FLOATS`.
        freqs, lengths, latent_cache, rope_cache: as of `openmythos_kernels.ops.mla.decode`.
        block: the weights of one block.

    Returns:
        (B, D), and the experts of each token, (B, topk) int64; (B, 0) with a dense FFN.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    return BLOCK_DECODE(x.contiguous(), freqs.contiguous(), lengths.contiguous(), latent_cache, rope_cache, *block)


def _fake(x, freqs, lengths, latent_cache, rope_cache, *block):
    return torch.empty_like(x), lengths.new_empty(x.shape[0], experts_per_token(BlockWeights(*block)))


BLOCK_DECODE = Op(
    "block_decode(Tensor x, Tensor freqs, Tensor lengths, Tensor(a!) latent_cache, Tensor(b!) rope_cache, "
    f"{BLOCK_SCHEMA}) -> (Tensor y, Tensor expert_idx)",
    fake=_fake,
    triton="openmythos_kernels.ops.layer.launch.decode:block_decode",
)
