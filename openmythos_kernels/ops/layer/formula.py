"""The ops over rows by the functions of `openmythos`, on any device and in any dtype."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openmythos.attention import MLAttention, attend
from openmythos.halting import ACTState, act_update
from openmythos.layers import Expert, RMSNorm
from openmythos.moe import MoEFFN
from openmythos_kernels.ops.layer.weights import AttentionWeights, BlockWeights, Eps, LoraWeights, StepWeights
from openmythos_kernels.ops.loop import formula as loop_formula


def table_rows(first: Tensor, last: Tensor, loop: Tensor, keep: int) -> Tensor:
    """The pool's row that `loop` reads of each token, int64; first, last and loop are broadcast to one shape."""
    at = torch.minimum(loop, last.long())
    return first.long() + (at % keep if keep else at)


@torch.no_grad()
def block_rows(x, freqs, sequence, position, loop, first, last, latent, k_rope, blocks: BlockWeights, keep: int):
    """`block_rows`."""
    names = AttentionWeights(*blocks.attention)
    eps = Eps(*blocks.eps)
    attn, ffn = _attention(names, blocks, eps), _ffn(blocks)
    chosen: list[Tensor] = []
    if not x.numel():
        return torch.empty_like(x), position.new_empty(len(x), blocks.topk if blocks.router else 0)
    # As N sequences of one token.
    x, phasors = x.unsqueeze(1), torch.view_as_complex(freqs).unsqueeze(1)
    normed = _norm(names.attn_norm, eps.attn_norm)(x)
    q = MLAttention.query(attn, normed, phasors)
    own = first[sequence, position].long() + (loop % keep if keep else loop)
    for pool, new in zip((latent, k_rope), MLAttention.latent(attn, normed, phasors)):
        pool[own] = new.squeeze(1)
    tokens = torch.arange(int(position.max()) + 1, device=x.device)
    seen = tokens <= position[:, None]
    rows = table_rows(first[sequence][:, : len(tokens)], last[sequence][:, : len(tokens)], loop[:, None], keep)
    rows = torch.where(seen, rows, own[:, None])  # what is hidden must be a number: 0 * NaN is none
    hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    k, v = MLAttention.expand(attn, latent[rows], k_rope[rows])
    x = x + F.linear(attend(q, k, v, hidden[:, None, None], lambda weight: weight), names.wo)
    behind = _norm(names.ffn_norm, eps.ffn_norm)(x)
    ffn.record_load = chosen.append
    y = (x + ffn(behind)).squeeze(1)
    return y, chosen[0] if chosen else position.new_empty(len(x), 0)


@torch.no_grad()
def loop_rows(
    h,
    e,
    h_out,
    cumulative_p,
    ponder,
    running,
    loop,
    limit,
    freqs,
    sequence,
    position,
    first,
    last,
    latents,
    k_ropes,
    blocks: BlockWeights,
    lora,
    step,
    embeddings,
    keep: int,
    eps: float,
    threshold: float,
    spend_remainder: bool,
    residual: bool,
    freeze: bool,
    act: bool,
    loops: int,
) -> Tensor:
    """`loop_rows`."""
    each = split(blocks)
    experts = len(each[0].gate)
    load = torch.zeros(len(each), experts, dtype=torch.int64, device=h.device)
    table = torch.stack([F.pad(emb, (0, h.shape[-1] - len(emb))) for emb in embeddings])
    weights = StepWeights(*step)
    for _ in range(loops):
        rows = torch.where((loop < limit) & (running | (not freeze)))[0]
        if not len(rows):
            break
        t, of, at = loop[rows], sequence[rows], position[rows]
        last[of, at] = t.to(last.dtype)
        before, injected = h[rows], e[rows]
        u = f = _norm(weights.norm_weight, eps)(before + table[t] + injected)
        for i, (block, latent, k_rope) in enumerate(zip(each, latents, k_ropes)):
            f, chosen = block_rows(f, freqs[rows], of, at, t, first, last, latent, k_rope, block, keep)
            load[i] += torch.bincount(chosen.flatten(), minlength=experts)
        if lora:
            down, scale, B = LoraWeights(*lora)
            f = f + (F.linear(f, down) * scale[t.clamp(max=len(scale) - 1)]) @ B
        if residual:
            f = f - u
        new = loop_formula.injected(before, injected, f, weights.log_A, weights.log_dt, weights.B)
        h[rows] = new
        loop[rows] = t + 1
        if not act:
            h_out[rows] = new
            continue
        p = loop_formula.probability(new, weights.halt_weight, weights.halt_bias)
        state = ACTState(h_out[rows], cumulative_p[rows], running[rows], ponder[rows])
        update: Any = partial(act_update, state, new, p, t, threshold)
        after = update(False)
        if spend_remainder:
            ends = t + 1 == limit[rows]
            after = after._replace(h_out=torch.where(ends[:, None], update(True).h_out, after.h_out))
        for held, value in zip((h_out, cumulative_p, running, ponder), after):
            held[rows] = value
    return load


def split(blocks: BlockWeights) -> list[BlockWeights]:
    """The weights of each block."""
    count = len(blocks.attention) // len(AttentionWeights._fields)

    def part(weights: Any, i: int) -> Any:
        if not isinstance(weights, (list, tuple)):
            return weights
        each = len(weights) // count
        return weights[i * each : (i + 1) * each]

    return [BlockWeights._make(part(x, i) for x in blocks) for i in range(count)]


def _norm(weight: Tensor, eps: float):
    return partial(RMSNorm.forward, SimpleNamespace(weight=weight, eps=eps))  # type: ignore[arg-type]


def _linear(weight: Tensor):
    return partial(F.linear, weight=weight)


def _attention(names: AttentionWeights, blocks: BlockWeights, eps: Eps) -> Any:
    """An `MLAttention` with these weights."""
    return SimpleNamespace(
        n_heads=blocks.n_heads,
        qk_nope_dim=blocks.nope,
        qk_rope_dim=blocks.rope,
        v_dim=blocks.v,
        kv_lora_rank=len(names.kv_norm),
        q_down=_linear(names.q_down),
        q_norm=_norm(names.q_norm, eps.latent_norms),
        q_up_nope=_linear(names.q_up_nope),
        q_up_rope=_linear(names.q_up_rope),
        kv_down=_linear(names.kv_down),
        kv_norm=_norm(names.kv_norm, eps.latent_norms),
        kv_up=_linear(names.kv_up),
    )


def _ffn(blocks: BlockWeights) -> Any:
    """An `MoEFFN` or `Expert` with these weights, to be called with (N, 1, D)."""

    def expert(gate: Tensor, up: Tensor, down: Tensor):
        layer: Any = SimpleNamespace(gate=_linear(gate), up=_linear(up), down=_linear(down))
        return partial(Expert.forward, layer)

    class Layer(SimpleNamespace):
        def __call__(self, x):
            return MoEFFN.forward(self, x) if blocks.router else self.shared_experts[0](x)  # type: ignore[arg-type]

        def route(self, flat):
            return MoEFFN.route(self, flat)  # type: ignore[arg-type]

        def routed(self, *args):
            return MoEFFN.routed(self, *args)  # type: ignore[arg-type]

    router, bias = blocks.router or (None, None)
    return Layer(
        router=None if router is None else _linear(router),
        router_bias=bias,
        topk=blocks.topk,
        idle_experts="none",
        exchange=None,
        routed_experts=[expert(*weights) for weights in zip(blocks.gate, blocks.up, blocks.down)],
        shared_experts=[expert(*weights) for weights in zip(blocks.shared_gate, blocks.shared_up, blocks.shared_down)],
    )
