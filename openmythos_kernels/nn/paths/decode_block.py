"""Decoding: one token per row through a block as one op.

A decode step is a dozen small calls a block. What the op may stand in for is asked once, then Python is out of the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from openmythos.attention import Mask
from openmythos.cache import LayerCache
from openmythos.dropout import drops
from openmythos_kernels.nn.attention import MLAttention, holds, phasors_of
from openmythos_kernels.nn.guards import kind_of, obstacle
from openmythos_kernels.nn.moe import MoEFFN, expert_weights
from openmythos_kernels.ops.derivatives import transformed
from openmythos_kernels.ops.layer import BlockWeights, block_decode
from openmythos_kernels.runtime.backends import choose


def through_block(block, x: Tensor, freqs_cis: Tensor, mask: Mask, entry: LayerCache) -> Tensor | None:
    """A fast TransformerBlock's output for x (B, 1, dim), or None where the op must not stand in for its parts."""
    if (
        not is_token(x)
        or freqs_cis.dtype != torch.complex64
        or not holds(entry, mask, len(x))
        or not is_whole(block, x.dtype)
    ):
        return None
    caches = block.attn.room(entry, x)
    lengths = torch.tensor(entry.lengths)
    y, expert_idx = block_decode(x.squeeze(1), phasors_of(freqs_cis), lengths, *caches, weights_of([block]))
    note([block], [entry], [expert_idx])
    return y.unsqueeze(1)


def is_token(x: Tensor) -> bool:
    """Whether x (B, T, dim) is one token per row, in a call where Python's time matters and that the ops can be."""
    return x.shape[1] == 1 and runs_at_once(x, "block_decode")


def runs_at_once(x: Tensor, op: str) -> bool:
    """Whether a call with x is to be computed now and not differentiated, in x's own dtype, by the `op` of a whole
    layer."""
    if torch.is_grad_enabled() or x.numel() == 0 or choose(op, x.device.type).backend != "cpu":
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode():
        return False
    return not transformed()


def is_whole(block, dtype: torch.dtype) -> bool:
    """Whether an op may stand in for everything in a fast TransformerBlock."""
    if not attends_whole(block, dtype):
        return False
    ffn = block._modules["ffn"]
    if kind_of(ffn) is not MoEFFN:
        return not block.dense_obstacle(dtype)
    router = ffn._modules["router"]
    if obstacle("ffn", ffn, MoEFFN) or obstacle("router", router, nn.Linear) or router.weight.dtype != dtype:
        return False
    return ffn.backend().fast


def attends_whole(block, dtype: torch.dtype) -> bool:
    """Whether an op may stand in for a fast TransformerBlock's norms and attention, and add what they make."""
    parts = block._modules
    attn = parts["attn"]
    if obstacle("attn", attn, MLAttention) or not (block.backend().fast and attn.backend().fast):
        return False
    if drops(parts["resid_drop"]) or drops(attn._modules["attn_drop"]):
        return False
    return {block.dtype, attn.kv_norm.weight.dtype} == {dtype}


def weights_of(blocks: Sequence) -> BlockWeights | None:
    """Those of all blocks, which must be of one kind; None if they are not."""
    lists: list[list] = [[] for _ in range(8)]
    kinds, eps = set(), []
    for block in blocks:
        parts = block._modules
        before, behind, ffn = parts["attn_norm"], parts["ffn_norm"], parts["ffn"]
        attention, sizes = parts["attn"].token_weights()
        mixed = kind_of(ffn) is MoEFFN
        experts = ffn._modules["routed_experts"]._modules.values() if mixed else ()
        shared = ffn._modules["shared_experts"]._modules.values() if mixed else (ffn,)
        router = [ffn._modules["router"].weight.contiguous(), ffn._buffers["router_bias"]] if mixed else []
        own = [
            before.weight.contiguous(),
            *(weight.contiguous() for weight in attention.values()),
            behind.weight.contiguous(),
        ]
        for to, added in zip(lists, (own, router, *expert_weights(experts), *expert_weights(shared))):
            to += added
        eps += [before.eps, parts["attn"].q_norm.eps, behind.eps]
        kinds.add((ffn.topk if mixed else 0, *sizes.values(), len(experts), len(shared)))
    return BlockWeights(*lists, *kinds.pop()[:5], eps) if len(kinds) == 1 else None


def note(blocks: Sequence, entries: Sequence[LayerCache], expert_idx: Sequence[Tensor]) -> None:
    """What calling the modules would have noted of a token per row."""
    for i, entry in enumerate(entries):
        entry.lengths = [n + 1 for n in entry.lengths]
        ffn = blocks[i % len(blocks)]._modules["ffn"]
        if kind_of(ffn) is MoEFFN:
            ffn.record_load(expert_idx[i])
