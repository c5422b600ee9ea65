"""Decoding: one token per row through a block as one op.

A decode step is a dozen small calls a block: the guards are asked once, then Python is out of the way. On a GPU it is
fewer launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import openmythos
from openmythos.cache import LayerCache
from openmythos.dropout import drops
from openmythos_kernels.nn import lengths
from openmythos_kernels.nn.call import Call, LayerCall
from openmythos_kernels.nn.guards import fast_obstacle, is_fast, obstacle
from openmythos_kernels.nn.paths import dense_ffn, fused_norms, mla_decode, moe_experts
from openmythos_kernels.ops.layer import AttentionWeights, BlockWeights, Eps, RouterWeights, block_decode
from openmythos_kernels.runtime.backends import Choice, choose
from openmythos_kernels.runtime.unproven import SWITCH

# Rows up to which the GPU's kernels stream each weight once. With more, a row's share of a launch is small anyway.
GPU_ROWS = 16

WHEN = (
    "one cached token per row, no gradients; latent attention and every part plain; on a CPU, or on a GPU for up to "
    f"{GPU_ROWS} rows with {SWITCH}=1"
)


def choice(block) -> Choice:
    if reason := block_obstacle(block, fused_norms.dtype_of_norms(block)):
        return Choice("reference", reason)
    return choose("block_decode", block._modules["attn_norm"].weight.device.type)


def refuses(call: LayerCall) -> str:
    x = call.x
    if x.shape[1] != 1 or call.kv_cache is None:
        return "not one token per row with a cache"
    if reason := not_now(call, "block_decode"):
        return reason
    if not call.narrow:
        return "rotary angles are not complex64"
    if not call.a_token_per_row:
        return "the mask does not show each row exactly its cache"
    return block_obstacle(call.module, x.dtype)


def run(call: LayerCall) -> Tensor:
    block, x, entry = call.module, call.x, call.entry
    caches = mla_decode.room(block.attn, entry, x)
    held, phasors = lengths.on_device(entry.lengths, x.device), mla_decode.phasors_of(call.freqs_cis)
    y, expert_idx = block_decode(x.squeeze(1), phasors, held, *caches, weights_of([block]))
    note([block], [entry], [expert_idx])
    return y.unsqueeze(1)


def not_now(call: Call, op: str) -> str:
    """Why `op`, which computes whole layers and has no derivatives, must not run in this call; empty when it may."""
    found = choose(op, call.device)
    if not found.fast:
        return f"{op} does not run on {call.device} here"
    if found.backend == "triton" and len(call.x) > GPU_ROWS:
        return f"more than {GPU_ROWS} rows"
    if call.x.numel() == 0:
        return "no tokens"
    return "" if call.inference else "gradients, autocast, a compiler or a transform"


def block_obstacle(block, dtype: torch.dtype | None) -> str:
    """Why an op must not stand in for everything in a fast TransformerBlock; empty when it may."""
    if reason := attention_obstacle(block, dtype):
        return reason
    ffn = block._modules["ffn"]
    if not is_fast(ffn, openmythos.MoEFFN):
        return dense_ffn.ffn_obstacle(ffn, dtype)
    router = ffn._modules["router"]
    if reason := fast_obstacle("ffn", ffn, openmythos.MoEFFN) or obstacle("router", router, nn.Linear):
        return reason
    if router.weight.dtype != dtype:
        return "the router is of another dtype"
    return "" if (found := moe_experts.choice(ffn)).fast else found.reason


def attention_obstacle(block, dtype: torch.dtype | None) -> str:
    """Why an op must not stand in for a fast TransformerBlock's norms and attention, and add what they make."""
    parts = block._modules
    attn = parts["attn"]
    if reason := fast_obstacle("attn", attn, openmythos.MLAttention):
        return reason
    for found in (fused_norms.choice(block), mla_decode.choice(attn)):
        if not found.fast:
            return found.reason
    if drops(parts["resid_drop"]) or drops(attn._modules["attn_drop"]):
        return "dropout"
    if {fused_norms.dtype_of_norms(block), attn.kv_norm.weight.dtype} != {dtype}:
        return "x and the weights have different dtypes"
    return ""


def weights_of(blocks: Sequence) -> Any:
    """Those of all blocks, which must be of one kind; None if they are not."""
    lists: list[list] = [[] for _ in range(8)]
    kinds: set[tuple] = set()
    eps: list[float] = []
    for block in blocks:
        parts = block._modules
        before, behind, ffn = parts["attn_norm"], parts["ffn_norm"], parts["ffn"]
        attention, sizes = mla_decode.weights(parts["attn"])
        mixed = is_fast(ffn, openmythos.MoEFFN)
        experts = ffn._modules["routed_experts"]._modules.values() if mixed else ()
        shared = ffn._modules["shared_experts"]._modules.values() if mixed else (ffn,)
        own = AttentionWeights(attn_norm=before.weight, **attention, ffn_norm=behind.weight)
        router = RouterWeights(weight=ffn._modules["router"].weight, bias=ffn._buffers["router_bias"]) if mixed else ()
        lists_of_experts = *moe_experts.expert_weights(experts), *moe_experts.expert_weights(shared)
        for to, added in zip(lists, (packed(own), packed(router), *lists_of_experts)):
            to += added
        eps += Eps(attn_norm=before.eps, latent_norms=parts["attn"].q_norm.eps, ffn_norm=behind.eps)
        kinds.add((ffn.topk if mixed else 0, *sizes.values(), len(experts), len(shared)))
    return BlockWeights._make([*lists, *kinds.pop()[:5], eps]) if len(kinds) == 1 else None


def packed(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights, densely packed."""
    return [weight.contiguous() for weight in weights]


def note(blocks: Sequence, entries: Sequence[LayerCache], expert_idx: Tensor | Sequence[Tensor]) -> None:
    """What calling the modules would have noted of a token per row."""
    held = [n + 1 for n in entries[0].lengths]
    for i, entry in enumerate(entries):
        entry.lengths = list(held)  # an entry may be there for several loops
        ffn = blocks[i % len(blocks)]._modules["ffn"]
        if is_fast(ffn, openmythos.MoEFFN):
            ffn.record_load(expert_idx[i])
