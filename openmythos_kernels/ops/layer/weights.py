"""Weights of whole layers by name.

An op takes a family of weights as one list of tensors. Its order is that of the fields below; the extension has the
same names (csrc/cpu/layer/weights.h), and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class AttentionWeights(NamedTuple):
    """A block's attention (see `openmythos.MLAttention`) and both its norms."""

    attn_norm: Tensor  # (D,)
    q_down: Tensor  # (q_rank, D)
    q_norm: Tensor  # (q_rank,)
    q_up_nope: Tensor  # (H * nope, q_rank)
    q_up_rope: Tensor  # (H * rope, q_rank)
    kv_down: Tensor  # (r + rope, D)
    kv_norm: Tensor  # (r,)
    kv_up: Tensor  # (H * (nope + v), r)
    wo: Tensor  # (D, H * v)
    ffn_norm: Tensor  # (D,)


class RouterWeights(NamedTuple):
    weight: Tensor  # (E, D)
    bias: Tensor  # (E,), in the weight's dtype or float32


class FfnWeights(NamedTuple):
    """A dense feed-forward layer."""

    gate: Tensor  # (I, D)
    up: Tensor  # (I, D)
    down: Tensor  # (D, I)


class LoraWeights(NamedTuple):
    down: Tensor  # (rank, D)
    scale: Tensor  # (depths, rank)
    B: Tensor  # (rank, D)


class StepWeights(NamedTuple):
    """The loop step's parameters, without the LoRA's."""

    log_A: Tensor  # (D,)
    log_dt: Tensor  # (1,)
    B: Tensor  # (D,)
    halt_weight: Tensor  # (1, D)
    halt_bias: Tensor  # (1,)
    norm_weight: Tensor  # (D,)


class Eps(NamedTuple):
    """The epsilons of a block's norms."""

    attn_norm: float
    latent_norms: float  # q_norm and kv_norm
    ffn_norm: float


class BlockWeights(NamedTuple):
    """A block's parameters, or those of several blocks, block after block; all in one dtype and densely packed.

    Attributes:
        attention: `AttentionWeights` of each block.
        router: `RouterWeights` of each block; empty with a dense FFN.
        gate, up, down: the E routed experts, (I, D), (I, D) and (D, I); empty with a dense FFN.
        shared_gate, shared_up, shared_down: the shared experts; a dense FFN is the only one.
        topk, n_heads, nope, rope, v: experts per token, heads, and channels per head.
        eps: `Eps` of each block.
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


# `BlockWeights` in an op's schema.
BLOCK_SCHEMA = (
    "Tensor[] attention, Tensor[] router, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor[] shared_gate, "
    "Tensor[] shared_up, Tensor[] shared_down, int topk, int n_heads, int nope, int rope, int v, float[] eps"
)

# The names of each family, by the op's argument.
NAMES = {
    "attention": AttentionWeights._fields,
    "router": RouterWeights._fields,
    "ffn": FfnWeights._fields,
    "lora": LoraWeights._fields,
    "step": StepWeights._fields,
    "eps": Eps._fields,
}


def experts_per_token(block: BlockWeights) -> int:
    """topk, or 0 with dense FFNs."""
    return block.topk if block.router else 0
