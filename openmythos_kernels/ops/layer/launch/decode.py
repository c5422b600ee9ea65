"""Launches of `block_decode` and `loop_decode`. The host reads nothing from the device, and the number of launches does
not depend on sizes: with E = 1 for experts and 0 for a dense FFN

    block_decode    7 + 2 E
    loop_decode     1 + loops * (blocks * (7 + 2 E) + 1 - E): in a loop's step the last block's experts are summed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.layer import configs
from openmythos_kernels.ops.layer.formula import split
from openmythos_kernels.ops.layer.kernels.step import enter_kernel, step_kernel
from openmythos_kernels.ops.layer.launch.block import Parts, block
from openmythos_kernels.ops.layer.weights import (
    AttentionWeights,
    BlockWeights,
    LoraWeights,
    RouterWeights,
    StepWeights,
    experts_per_token,
)
from openmythos_kernels.ops.mla.decode import check_layer


def block_decode(x, freqs, lengths, latent_cache, rope_cache, *weights):
    """`openmythos::block_decode`."""
    own = BlockWeights(*weights)
    _check(x, freqs, lengths, latent_cache, rope_cache, own)
    expert_idx = lengths.new_empty(len(x), experts_per_token(own))
    if not x.numel():
        return torch.empty_like(x), expert_idx
    return block(x, freqs, lengths, latent_cache, rope_cache, own, expert_idx).sum(), expert_idx


def loop_decode(h, e, freqs, lengths, latent_caches, rope_caches, *rest):
    """`openmythos::loop_decode`."""
    fields = len(BlockWeights._fields)
    weights = BlockWeights(*rest[:fields])
    lora, step, embeddings, eps, threshold, spend_remainder, residual, act = rest[fields:]
    blocks, loops = split(weights), len(embeddings)
    if not loops or not len(latent_caches) == len(rope_caches) == loops * len(blocks):
        raise ValueError(
            f"latent_caches, rope_caches: got {len(latent_caches)} and {len(rope_caches)} tensors, must be one for "
            f"each of {loops} loops and {len(blocks)} blocks"
        )
    for i, caches in enumerate(zip(latent_caches, rope_caches)):
        _check(h, freqs, lengths, *caches, blocks[i % len(blocks)])
    _check_step(h, e, StepWeights(*step), lora, embeddings)
    expert_idx = lengths.new_empty(len(latent_caches), len(h), experts_per_token(weights))
    ponder = h.new_zeros(len(h), dtype=torch.float32) if not (act and h.numel()) else None
    if not h.numel():
        return torch.empty_like(h), ponder, expert_idx

    state = _State(h, e, StepWeights(*step), [*map(torch.Tensor.contiguous, embeddings)], eps)
    for t in range(loops):
        parts = Parts(state.u)
        for i, own in enumerate(blocks):
            at = t * len(blocks) + i
            caches = latent_caches[at], rope_caches[at]
            parts = block(parts.sum(), freqs, lengths, *caches, own, expert_idx[at])
        state.step(parts, lora, t, threshold, spend_remainder, residual, act)
    return (state.h_out, state.ponder, expert_idx) if act else (state.h, ponder, expert_idx)


class _State:
    """What a loop hands to the next one.

    Attributes:
        h, h_out, cumulative_p, running, ponder: as of `openmythos_kernels.ops.loop.loop_step`.
        u: what the next loop's first block reads.
    """

    def __init__(self, h: Tensor, e: Tensor, weights: StepWeights, embeddings: list[Tensor], eps: float):
        self._e, self._weights, self._embeddings, self._eps = e, weights, embeddings, eps
        self._tile = configs.row(h.shape[1])
        self.h, self.u = h, torch.empty_like(h)
        self.h_out: Any = None
        self.cumulative_p: Any = None
        self.running: Any = None
        self.ponder: Any = None
        emb = embeddings[0]
        enter_kernel[(len(h),)](
            h, e, emb, weights.norm_weight, self.u, emb.numel(), eps, D=h.shape[1], **self._tile, **configs.overlap()
        )

    def step(self, parts: Parts, lora, t: int, threshold: float, spend_remainder: bool, residual: bool, act: bool):
        """Loop t behind its blocks."""
        N, weights, last = len(self.h), self._weights, t == len(self._embeddings) - 1
        down, scale, lora_B = LoraWeights(*lora) if lora else (None, None, None)
        emb = self._embeddings[t if last else t + 1]
        next_h, next_u = torch.empty_like(self.h), torch.empty_like(self.h)
        next_h_out = torch.empty_like(self.h) if act else None
        cumulative_p, ponder = (self.h.new_empty(N, dtype=torch.float32) if act else None for _ in range(2))
        running = self.h.new_empty(N, dtype=torch.uint8) if act else None
        step_kernel[(N,)](
            self.h,
            self._e,
            self.u,
            *parts.tensors(),
            self.h_out,
            self.cumulative_p,
            self.running,
            self.ponder,
            down,
            scale,
            lora_B,
            weights.log_A,
            weights.log_dt,
            weights.B,
            weights.halt_weight,
            weights.halt_bias,
            weights.norm_weight,
            emb,
            next_h,
            next_h_out,
            cumulative_p,
            running,
            ponder,
            next_u,
            N,
            t,
            0 if scale is None else min(t, len(scale) - 1),
            emb.numel(),
            threshold,
            self._eps,
            **parts.constants(),
            RANK=0 if down is None else len(down),
            FIRST=t == 0,
            LAST=last,
            ACT=act,
            SPEND_REMAINDER=spend_remainder and last,
            RESIDUAL=residual,
            **self._tile,
            **configs.overlap(),
        )
        self.h, self.u, self.h_out = next_h, next_u, next_h_out
        self.cumulative_p, self.running, self.ponder = cumulative_p, running, ponder


def _check(x, freqs, lengths, latent_cache, rope_cache, weights: BlockWeights) -> None:
    """Raises the ops' ValueErrors about a block; those about its experts come from `Experts`."""
    check_for_triton("x", x)
    own, D = AttentionWeights(*weights.attention), x.shape[-1]
    mla = own.q_down, own.q_norm, own.q_up_nope, own.q_up_rope, own.kv_down, own.kv_norm, own.kv_up, own.wo
    check_layer(
        x, freqs, latent_cache, rope_cache, lengths, mla, weights.n_heads, weights.nope, weights.rope, weights.v
    )
    _expect(x.dtype, attn_norm=(own.attn_norm, (D,)), ffn_norm=(own.ffn_norm, (D,)))
    _expect_dense(own._asdict())
    if not weights.router:
        return
    router, experts = RouterWeights(*weights.router), len(weights.gate)
    _expect(x.dtype, router=(router.weight, (experts, D)))
    _expect(torch.float32 if router.bias.dtype == torch.float32 else x.dtype, router_bias=(router.bias, (experts,)))
    _expect_dense(dict(router=router.weight, router_bias=router.bias))
    if not 0 < weights.topk <= experts:
        raise ValueError(f"topk = {weights.topk}: must be in [1, {experts}], the number of experts")


def _check_step(h, e, step: StepWeights, lora, embeddings) -> None:
    """Raises the ValueErrors of `loop_decode` about what follows the blocks."""
    D = h.shape[1]
    wide = dict.fromkeys(("log_A", "B", "norm_weight"), (D,))
    shapes = wide | dict(log_dt=(1,), halt_weight=(1, D), halt_bias=(1,))
    _expect(h.dtype, e=(e, h.shape), **{name: (getattr(step, name), shape) for name, shape in shapes.items()})
    _expect_dense(step._asdict())
    if lora:
        own = LoraWeights(*lora)
        rank = len(own.down)
        _expect(h.dtype, lora_down=(own.down, (rank, D)), lora_B=(own.B, (rank, D)))
        _expect(h.dtype, lora_scale=(own.scale, (len(own.scale), rank)))
        _expect_dense(dict(lora_down=own.down, lora_scale=own.scale, lora_B=own.B))
    for emb in embeddings:
        _expect(h.dtype, embeddings=(emb, (min(emb.numel(), D),)))


def _expect(dtype: torch.dtype, **tensors) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be {dtype} {tuple(shape)}")


def _expect_dense(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, must be densely packed")
