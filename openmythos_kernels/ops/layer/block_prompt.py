"""`openmythos::block_prompt`: whole sequences through a pre-norm transformer block, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openmythos_kernels.ops.op import Op


def block_prompt(
    x: Tensor,
    freqs: Tensor,
    attention: Sequence[Tensor],
    ffn: Sequence[Tensor],
    n_heads: int,
    nope: int,
    rope: int,
    v: int,
    eps: Sequence[float],
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """`x + attention(norm(x))`, then `x + ffn(norm(x))` with a dense FFN, as `openmythos.TransformerBlock`.

    CPU only, without gradients. If the sequences split evenly, each thread takes its own through the whole block.
    Products are the library's, so the last bits depend on the number of threads.

    Args:
        x: (B, T, D) float32. freqs: (B or 1, T, rope / 2, 2) float32: (cos, sin) at each position.
        attention: `AttentionWeights` or a list in its order.
        ffn: `FfnWeights` or a list in its order; empty if the feed-forward layer is not dense.
        n_heads, nope, rope, v: heads, and channels per head.
        eps: `Eps` or a list in its order.
        causal: whether a query sees only the keys up to its own position; else it sees all.

    Returns:
        (B, T, D) and an empty tensor; without `ffn`, x + attention(norm(x)) and its norm, the input of the next layer.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    weights = [weight.contiguous() for weight in attention], [weight.contiguous() for weight in ffn]
    return BLOCK_PROMPT(x.contiguous(), freqs.contiguous(), *weights, n_heads, nope, rope, v, list(eps), causal)


def _fake(x, freqs, attention, ffn, *rest):
    return torch.empty_like(x), x.new_empty(0) if ffn else torch.empty_like(x)


BLOCK_PROMPT = Op(
    "block_prompt(Tensor x, Tensor freqs, Tensor[] attention, Tensor[] ffn, int n_heads, int nope, int rope, int v, "
    "float[] eps, bool causal) -> (Tensor y, Tensor normed)",
    fake=_fake,
)
