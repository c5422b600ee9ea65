"""`openmythos::block_decode`: one token per row through a pre-norm transformer block, against its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.op import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BlockWeights(NamedTuple):
    """A block's parameters, or those of several blocks one after the other, all in one dtype and densely packed.

    Attributes:
        attention: attn_norm (D,), q_down (q_rank, D), q_norm (q_rank,), q_up_nope (H * nope, q_rank),
            q_up_rope (H * rope, q_rank), kv_down (r + rope, D), kv_norm (r,), kv_up (H * (nope + v), r),
            wo (D, H * v), ffn_norm (D,); see `openmythos.MLAttention`.
        router: weight (E, D) and bias (E,), the bias also in float32; empty for a dense FFN.
        gate, up, down: of E routed experts, (I, D), (I, D) and (D, I); empty for a dense FFN.
        shared_gate, shared_up, shared_down: of the shared experts; a dense FFN is the only one.
        topk, n_heads, nope, rope, v: experts per token, heads, and channels per head.
        eps: of attn_norm, of the latents' norms, of ffn_norm.
    """

    attention: Sequence[Tensor]
    router: Sequence[Tensor]
    gate: Sequence[Tensor]
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    shared_gate: Sequence[Tensor]
    shared_up: Sequence[Tensor]
    shared_down: Sequence[Tensor]
    topk: int
    n_heads: int
    nope: int
    rope: int
    v: int
    eps: Sequence[float]


def block_decode(
    x: Tensor, freqs: Tensor, lengths: Tensor, latent_cache: Tensor, rope_cache: Tensor, block: BlockWeights
) -> tuple[Tensor, Tensor]:
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`, as `openmythos.TransformerBlock`; appends to the caches.

    Inference only: nothing here has a gradient. CPU only.

    Args:
        x: (B, D), one of DTYPES.
        freqs, lengths, latent_cache, rope_cache: as of `openmythos_kernels.ops.mla.decode`.
        block: the weights of one block.

    Returns:
        (B, D), and the experts that each token was routed to, (B, topk) int64; (B, 0) with a dense FFN.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    return BLOCK_DECODE(x.contiguous(), freqs.contiguous(), lengths.contiguous(), latent_cache, rope_cache, *block)


def _fake(x, freqs, lengths, latent_cache, rope_cache, attention, router, *rest):
    topk = rest[6] if router else 0
    return torch.empty_like(x), lengths.new_empty(x.shape[0], topk)


WEIGHTS = (
    "Tensor[] attention, Tensor[] router, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor[] shared_gate, "
    "Tensor[] shared_up, Tensor[] shared_down, int topk, int n_heads, int nope, int rope, int v, float[] eps"
)
BLOCK_DECODE = Op(
    f"block_decode(Tensor x, Tensor freqs, Tensor lengths, Tensor(a!) latent_cache, Tensor(b!) rope_cache, {WEIGHTS}) "
    "-> (Tensor y, Tensor expert_idx)",
    fake=_fake,
)
