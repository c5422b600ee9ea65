"""Specifications of `block_decode` and `loop_decode`. The truth is the reference's modules, with the inputs as their
parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import openmythos
from openmythos.attention import CausalMask
from openmythos.cache import LOOP_KEY, LayerCache
from openmythos.layers import at_least_fp32
from openmythos_kernels.ops.layer import (
    AttentionWeights,
    BlockWeights,
    Eps,
    LoraWeights,
    RouterWeights,
    StepWeights,
    block_decode,
    loop_decode,
)
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer
from openmythos_kernels.verify.specs.mla_attention import angles, row_lengths


def _in_order(kind: Any, **names: str) -> tuple[str, ...]:
    """The reference's names of the parameters, in the order of `kind`."""
    return kind(**names)


_ATTENTION = _in_order(
    AttentionWeights,
    attn_norm="attn_norm",
    q_down="attn.q_down",
    q_norm="attn.q_norm",
    q_up_nope="attn.q_up_nope",
    q_up_rope="attn.q_up_rope",
    kv_down="attn.kv_down",
    kv_norm="attn.kv_norm",
    kv_up="attn.kv_up",
    wo="attn.wo",
    ffn_norm="ffn_norm",
)
_STEP = _in_order(
    StepWeights,
    log_A="injection.log_A",
    log_dt="injection.log_dt",
    B="injection.B",
    halt_weight="act.halt.weight",
    halt_bias="act.halt.bias",
    norm_weight="norm.weight",
)
_LORA = _in_order(LoraWeights, down="lora.down.weight", scale="lora.scale.weight", B="lora.B")
_EPS = 1e-6


def make_blocks(sizes: Sizes, dtype, device, draw) -> Inputs:
    """Weights of sizes["blocks"] blocks; their FFN is dense if experts = 0."""
    D, H, r, q_rank = (sizes[name] for name in ("dim", "heads", "latent", "q_rank"))
    nope, rope, v, experts, inner = (sizes[name] for name in ("nope", "rope", "v", "experts", "inner"))
    blocks = range(sizes["blocks"])

    def matrix(rows: int, cols: int) -> Tensor:
        return draw(rows, cols, scale=cols**-0.5)

    def experts_of(count: int, width: int) -> tuple[list, list, list]:
        shapes = ((width, D), (width, D), (D, width))
        gate, up, down = ([matrix(*shape) for _ in range(count * len(blocks))] for shape in shapes)
        return gate, up, down

    attention: list[Tensor] = []
    router: list[Tensor] = []
    for _ in blocks:
        attention += AttentionWeights(
            attn_norm=draw(D),
            q_down=matrix(q_rank, D),
            q_norm=draw(q_rank),
            q_up_nope=matrix(H * nope, q_rank),
            q_up_rope=matrix(H * rope, q_rank),
            kv_down=matrix(r + rope, D),
            kv_norm=draw(r),
            kv_up=matrix(H * (nope + v), r),
            wo=matrix(D, H * v),
            ffn_norm=draw(D),
        )
        if experts:  # the bias alone decides which experts are chosen, and their order, whatever the rounding
            bias = 16.0 * torch.arange(experts, device=device).to(dtype)
            router += RouterWeights(weight=matrix(experts, D), bias=bias.roll(len(router)))
    gate, up, down = experts_of(experts, inner)
    shared = sizes["shared"] if experts else 1, sizes.get("shared_inner", inner + 1)
    shared_gate, shared_up, shared_down = experts_of(*shared)
    return dict(
        attention=attention,
        router=router,
        gate=gate,
        up=up,
        down=down,
        shared_gate=shared_gate,
        shared_up=shared_up,
        shared_down=shared_down,
        topk=sizes["topk"],
        n_heads=H,
        nope=nope,
        rope=rope,
        v=v,
        eps=[*Eps(_EPS, _EPS, _EPS)] * len(blocks),
    )


def _make_block(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    B, C = sizes["rows"], sizes["capacity"]
    return dict(
        x=draw(B, sizes["dim"]),
        freqs=angles(B, 1, sizes["rope"], device).squeeze(1),
        lengths=row_lengths(sizes["held"], B, device).clamp(max=C - 1),
        latent_cache=draw(B, C, sizes["latent"]),
        rope_cache=draw(B, C, sizes["rope"]),
        **make_blocks(sizes, dtype, device, draw),
    )


def _make_loop(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    B, C, D, rank, loops = (sizes[name] for name in ("rows", "capacity", "dim", "rank", "loops"))
    caches = range(loops * sizes["blocks"])
    return dict(
        h=draw(B, D),
        e=draw(B, D),
        freqs=angles(B, 1, sizes["rope"], device).squeeze(1),
        lengths=row_lengths(sizes["held"], B, device).clamp(max=C - 1),
        latent_caches=[draw(B, C, sizes["latent"]) for _ in caches],
        rope_caches=[draw(B, C, sizes["rope"]) for _ in caches],
        **make_blocks(sizes, dtype, device, draw),
        lora=[
            *LoraWeights(
                down=draw(rank, D, scale=D**-0.5), scale=draw(sizes["depths"], rank), B=draw(rank, D, scale=0.3)
            )
        ]
        if rank
        else [],
        # Halting probabilities of about a half: all halt in the second loop, whatever the rounding. Or none halts.
        step=[
            *StepWeights(
                log_A=draw(D, scale=0.5),
                log_dt=draw(1, scale=0.5),
                B=draw(D),
                halt_weight=draw(1, D, scale=0.03 * D**-0.5),
                halt_bias=torch.full((1,), -8.0 if sizes["halting"] == "none" else 0.0, dtype=dtype, device=device),
                norm_weight=draw(D),
            )
        ],
        embeddings=[draw(D // 8) for _ in range(loops)],
        norm_eps=_EPS,
        threshold=0.7,
        spend_remainder=sizes["spend_remainder"],
        residual=sizes["residual"],
        act=sizes["act"],
    )


def _appended(latent: list[Tensor], k_rope: list[Tensor], lengths: Tensor) -> Outputs:
    at = torch.arange(len(lengths), device=lengths.device), lengths
    return {"latent": torch.stack([c[at] for c in latent]), "k_rope": torch.stack([c[at] for c in k_rope])}


def _copies(caches: list[Tensor]) -> list[Tensor]:
    """Ops write caches in place, so these must be dense."""
    return [cache.clone(memory_format=torch.contiguous_format) for cache in caches]


def _fast_block(x, freqs, lengths, latent_cache, rope_cache, **blocks) -> Outputs:
    (latent,), (k_rope,) = _copies([latent_cache]), _copies([rope_cache])
    y, expert_idx = block_decode(x, freqs, lengths, latent, k_rope, BlockWeights(**_dense(blocks)))
    return {"y": y, "expert_idx": expert_idx, **_appended([latent], [k_rope], lengths)}


def _fast_loop(
    h,
    e,
    freqs,
    lengths,
    latent_caches,
    rope_caches,
    lora,
    step,
    embeddings,
    norm_eps,
    threshold,
    spend_remainder,
    residual,
    act,
    **blocks,
) -> Outputs:
    latent, k_rope = _copies(latent_caches), _copies(rope_caches)
    dense = _dense(dict(lora=lora, step=step, embeddings=embeddings))
    out = loop_decode(
        h,
        e,
        freqs,
        lengths,
        latent,
        k_rope,
        BlockWeights(**_dense(blocks)),
        **dense,
        eps=norm_eps,
        threshold=threshold,
        spend_remainder=spend_remainder,
        residual=residual,
        act=act,
    )
    return {**out._asdict(), **_appended(latent, k_rope, lengths)}


def _dense(inputs: Inputs) -> Inputs:
    def dense(value):
        return [x.contiguous() if isinstance(x, Tensor) else x for x in value] if isinstance(value, list) else value

    return {name: dense(value) for name, value in inputs.items()}


def config(blocks: Inputs, count: int, **more) -> openmythos.MythosConfig:
    """Only what forward reads of it matters; shapes are those of the inputs."""
    attention = AttentionWeights(*blocks["attention"][: len(AttentionWeights._fields)])
    return openmythos.MythosConfig(
        vocab_size=8,
        dim=attention.attn_norm.shape[0],
        n_heads=blocks["n_heads"],
        n_kv_heads=1,
        kv_lora_rank=attention.kv_norm.shape[0],
        q_lora_rank=attention.q_norm.shape[0],
        qk_nope_head_dim=blocks["nope"],
        qk_rope_head_dim=blocks["rope"],
        v_head_dim=blocks["v"],
        n_experts=max(len(blocks["gate"]) // count, 1),
        n_experts_per_tok=max(blocks["topk"], 1),
        n_shared_experts=len(blocks["shared_gate"]) // count,
        expert_dim=4,
        core_layers=count,
        core_ffn="moe" if blocks["router"] else "dense",
        **more,
    )


def parameters(blocks: Inputs, i: int, count: int) -> dict[str, Tensor]:
    """Block i's weights by their names in an `openmythos.TransformerBlock`."""

    def mine(name: str) -> list:
        each = len(blocks[name]) // count
        return blocks[name][i * each : (i + 1) * each]

    named = {f"{name}.weight": weight for name, weight in zip(_ATTENTION, mine("attention"))}
    if not blocks["router"]:
        return named | {f"ffn.{name}.weight": mine(f"shared_{name}")[0] for name in ("gate", "up", "down")}
    router = RouterWeights(*mine("router"))
    named |= {"ffn.router.weight": router.weight, "ffn.router_bias": router.bias}
    for name in ("gate", "up", "down"):
        for kind, weights in (("routed", mine(name)), ("shared", mine(f"shared_{name}"))):
            named |= {f"ffn.{kind}_experts.{e}.{name}.weight": weight for e, weight in enumerate(weights)}
    return named


def _cache(latent: Tensor, k_rope: Tensor, lengths: Tensor) -> LayerCache:
    entry = LayerCache()
    entry.tensors = {"latent": latent.clone(), "k_rope": k_rope.clone()}
    entry.lengths = lengths.tolist()
    return entry


def _reference_block(x, freqs, lengths, latent_cache, rope_cache, **blocks) -> Outputs:
    with torch.device("meta"):
        module = openmythos.TransformerBlock(config(blocks, 1), use_moe=bool(blocks["router"]))
    entry, chosen = _cache(latent_cache, rope_cache, lengths), _recorded([module])
    mask = CausalMask(lengths.tolist(), 1)
    arguments = (x.unsqueeze(1), torch.view_as_complex(freqs).unsqueeze(1), mask, {"block": entry}, "block")
    y = torch.func.functional_call(module, parameters(blocks, 0, 1), arguments)
    expert_idx = torch.cat(chosen) if chosen else lengths.new_empty(len(x), 0)
    return {
        "y": y.squeeze(1),
        "expert_idx": expert_idx,
        **_appended([entry.tensors["latent"]], [entry.tensors["k_rope"]], lengths),
    }


def _reference_loop(
    h,
    e,
    freqs,
    lengths,
    latent_caches,
    rope_caches,
    lora,
    step,
    embeddings,
    norm_eps,
    threshold,
    spend_remainder,
    residual,
    act,
    **blocks,
) -> Outputs:
    loops, count = len(embeddings), len(blocks["attention"]) // len(_ATTENTION)
    cfg = config(
        blocks,
        count,
        lora_rank=LoraWeights(*lora).down.shape[0] if lora else 0,
        act_threshold=threshold,
        max_loop_iters=LoraWeights(*lora).scale.shape[0] if lora else loops,
        act_remainder="last" if spend_remainder else "drop",
        injection="residual" if residual else "mythos",
        halting="evolve" if act else "off",
    )
    with torch.device("meta"):
        module: Any = openmythos.RecurrentBlock(cfg)
    core = [module.block] if count == 1 else list(module.block)
    named = dict(zip(_STEP, step)) | dict(zip(_LORA, lora))
    for i in range(count):
        prefix = "block." if count == 1 else f"block.{i}."
        named |= {prefix + name: weight for name, weight in parameters(blocks, i, count).items()}
    keys = [LOOP_KEY.format(t) + ("" if count == 1 else f".{i}") for t in range(loops) for i in range(count)]
    cache = {key: _cache(latent, rope, lengths) for key, latent, rope in zip(keys, latent_caches, rope_caches)}
    # The inputs' embeddings instead of sinusoids of the loops' numbers.
    module.injection.enter = lambda h, e, t, norm: norm(
        h + torch.nn.functional.pad(embeddings[t], (0, h.shape[-1] - len(embeddings[t]))) + e
    )
    chosen = _recorded(core)
    mask = CausalMask(lengths.tolist(), 1)
    arguments = (h.unsqueeze(1), e.unsqueeze(1), torch.view_as_complex(freqs).unsqueeze(1), mask, loops, cache, act)
    out = torch.func.functional_call(module, named, arguments)
    out, ponder = out if act else (out, at_least_fp32(h.new_zeros(len(h), 1)))
    expert_idx = torch.stack(chosen) if chosen else lengths.new_empty(len(keys), len(h), 0)
    entries = [cache[key].tensors for key in keys]
    appended = _appended([entry["latent"] for entry in entries], [entry["k_rope"] for entry in entries], lengths)
    return {"h_out": out.squeeze(1), "ponder": ponder.squeeze(1), "expert_idx": expert_idx, **appended}


def _recorded(blocks: list) -> list[Tensor]:
    """A list to which the blocks' layers will append their choices of experts, in running order."""
    chosen: list[Tensor] = []
    for block in blocks:
        block.ffn.choices = chosen
        block.eval()
    return chosen if isinstance(blocks[0].ffn, openmythos.MoEFFN) else []


def _hostile(inputs: Inputs) -> Inputs:
    """NaN in all cache slots past the rows' lengths."""

    def fresh(cache: Tensor) -> Tensor:
        out = torch.full_like(cache, float("nan"))
        for b, n in enumerate(inputs["lengths"].tolist()):
            out[b, :n] = cache[b, :n]
        return out

    caches = {name: value for name, value in inputs.items() if "cache" in name}
    return inputs | {n: [fresh(c) for c in v] if isinstance(v, list) else fresh(v) for n, v in caches.items()}


def _sizes(**other) -> dict:
    return (
        dict(
            rows=2,
            dim=24,
            heads=2,
            latent=12,
            q_rank=10,
            nope=6,
            rope=4,
            v=5,
            capacity=9,
            held=[3, 8],
            blocks=1,
            experts=3,
            topk=3,
            shared=1,
            inner=7,
            loops=3,
            rank=2,
            depths=4,
            halting="second",
            spend_remainder=False,
            residual=False,
            act=True,
        )
        | other
    )


_CASES = {
    "plain": _sizes(),
    "some experts": _sizes(experts=9, topk=2, shared=2),
    "dense": _sizes(experts=0, topk=0, dim=33),
    "no shared expert": _sizes(shared=0),
    "one row, empty cache": _sizes(rows=1, held=0),
    "odd sizes, wide": _sizes(rows=3, dim=131, latent=33, inner=41, heads=5, capacity=150, held=[149, 0, 128]),
}
_RANGES = dict(
    rows=(1, 3), dim=(8, 70), heads=(1, 5), latent=(1, 40), q_rank=(1, 30), nope=(1, 12), v=(1, 12), inner=(1, 30)
)

SPECIFICATIONS = [
    Specification(
        name="block_decode",
        backends=("triton", "cpu"),
        make=_make_block,
        fast=_fast_block,
        reference=_reference_block,
        differentiable=(),
        exact=("expert_idx",),
        matrix=True,
        cases=_CASES | {"more rows than a tile": _sizes(rows=17, experts=9, topk=2, shared=2, held=3)},
        ranges=_RANGES,
        hostile=_hostile,
    ),
    Specification(
        name="loop_decode",
        backends=("triton", "cpu"),
        make=_make_loop,
        fast=_fast_loop,
        reference=_reference_loop,
        differentiable=(),
        exact=("expert_idx",),
        matrix=True,
        chained=True,
        cases=_CASES
        | {
            "one loop": _sizes(loops=1),
            "no LoRA": _sizes(rank=0),
            "past the trained depth": _sizes(loops=3, depths=2),
            "nothing halts": _sizes(halting="none"),
            "the rest at last": _sizes(halting="none", spend_remainder=True),
            "residual": _sizes(residual=True),
            "no halting": _sizes(act=False, spend_remainder=True),
            "two blocks": _sizes(blocks=2),
            "two dense blocks": _sizes(blocks=2, experts=0, topk=0),
            "residual, two blocks, the rest at last": _sizes(
                blocks=2, loops=2, rank=1, residual=True, halting="none", spend_remainder=True
            ),
        },
        ranges=_RANGES,
        hostile=_hostile,
    ),
]
