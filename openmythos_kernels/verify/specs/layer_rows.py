"""Specifications of the ops over rows. The truth is their formulas; tests/openmythos_kernels/ops/layer compares these
with the reference's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from openmythos_kernels.ops.layer import BlockWeights, LoraWeights, StepWeights, block_rows, linear_rows, loop_rows
from openmythos_kernels.ops.layer import formula as by_formula
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer
from openmythos_kernels.verify.specs.layer_decode import make_blocks
from openmythos_kernels.verify.specs.mla_attention import angles

_EPS = 1e-6
_OPTIONS = ("keep", "eps", "threshold", "spend_remainder", "residual", "freeze", "act", "loops")


def _random(generator, device):
    """`draw(low, high, *shape)`: integers in [low, high); uninitialized without a generator."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        if generator is None:
            return torch.empty(shape, dtype=torch.int64, device=device)
        return torch.randint(low, high, shape, generator=generator, device=device)

    return draw


def _rows(sizes: Sizes, device, generator) -> Inputs:
    """Rows of a table in which every token has room for sizes["depth"] loops, and tokens ran different numbers."""
    N, S, C, depth, keep = (sizes[name] for name in ("rows", "sequences", "tokens", "depth", "keep"))
    integers = _random(generator, device)
    slots = min(depth, keep) if keep else depth
    tokens, order = (
        torch.empty(S * C, dtype=torch.int64, device=device)
        if generator is None
        else torch.randperm(S * C, generator=generator, device=device)
        for _ in range(2)
    )
    chosen = tokens[:N]  # no two rows are the same token
    sequence, position = chosen // C, chosen % C
    return dict(
        freqs=angles(N, 1, sizes["rope"], device).squeeze(1),
        sequence=sequence,
        position=position,
        loop=integers(0, depth, N),
        first=(order * slots).view(S, C).int(),
        last=integers(0, depth, S, C).int(),
    )


def _pool(sizes: Sizes) -> int:
    keep, depth = sizes["keep"], sizes["depth"]
    return sizes["sequences"] * sizes["tokens"] * (min(depth, keep) if keep else depth)


def _make_block(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    rows = _rows(sizes, device, generator)
    if generator is not None:
        rows["last"][rows["sequence"], rows["position"]] = rows["loop"].int()
    return dict(
        x=draw(sizes["rows"], sizes["dim"]),
        **rows,
        latent=draw(_pool(sizes), sizes["latent"]),
        k_rope=draw(_pool(sizes), sizes["rope"]),
        **make_blocks({**sizes, "blocks": 1}, dtype, device, draw),
        keep=sizes["keep"],
    )


def _make_loop(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw, integers = drawer(dtype, device, generator), _random(generator, device)
    N, D, rank, depth = (sizes[name] for name in ("rows", "dim", "rank", "depth"))
    rows = _rows(sizes, device, generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    running, limit = integers(0, 5, N) > 0, (rows["loop"] + integers(0, 4, N)).clamp(max=depth)
    if generator is not None:
        fresh = rows["loop"] == 0  # such a token has no latents: it must run
        running, limit = running | fresh, torch.where(fresh, limit.clamp(min=1), limit)
        rows["last"][rows["sequence"], rows["position"]] = (rows["loop"] - 1).clamp(min=0).int()
    lora = LoraWeights(draw(rank, D, scale=D**-0.5), draw(sizes["trained"], rank), draw(rank, D, scale=0.3))
    return dict(
        h=draw(N, D),
        e=draw(N, D),
        h_out=draw(N, D),
        # Each loop adds about 1/2: rows halt after this loop or the next, whatever the rounding.
        cumulative_p=integers(0, 2, N).to(wide) * 0.375,
        ponder=integers(0, 9, N).to(wide),
        running=running,
        **rows | {"limit": limit},
        latents=[draw(_pool(sizes), sizes["latent"]) for _ in range(sizes["blocks"])],
        k_ropes=[draw(_pool(sizes), sizes["rope"]) for _ in range(sizes["blocks"])],
        **make_blocks(sizes, dtype, device, draw),
        lora=[*lora] if rank else [],
        step=[
            *StepWeights(
                log_A=draw(D, scale=0.5),
                log_dt=draw(1, scale=0.5),
                B=draw(D),
                halt_weight=draw(1, D, scale=0.03 * D**-0.5),
                halt_bias=torch.zeros(1, dtype=dtype, device=device),
                norm_weight=draw(D),
            )
        ],
        embeddings=[draw(D // 8) for _ in range(depth)],
        eps_of_norm=_EPS,
        threshold=0.7,
        **{name: sizes[name] for name in ("keep", "spend_remainder", "residual", "freeze", "act", "loops")},
    )


def _make_linear(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    return dict(x=draw(sizes["rows"], sizes["dim"]), weight=draw(sizes["outputs"], sizes["dim"]))


def _split(inputs: Inputs) -> tuple[BlockWeights, Inputs]:
    """The blocks' weights, and the other inputs; all dense, and copies of what the ops write."""

    def own(value):
        if isinstance(value, (list, tuple)):
            return [own(x) for x in value]
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    copies = {name: own(value) for name, value in inputs.items()}
    return BlockWeights(*(copies.pop(name) for name in BlockWeights._fields)), copies


def _written(x: Inputs) -> tuple[Tensor, Tensor]:
    """The table's entries of the rows' own tokens."""
    return x["first"][x["sequence"], x["position"]].long(), x["last"][x["sequence"], x["position"]]


def _block(call: Any):
    def run(**inputs) -> Outputs:
        blocks, x = _split(inputs)
        keep = x.pop("keep")
        y, expert_idx = call(*x.values(), blocks, keep)
        first, _ = _written(x)
        row = first + (x["loop"] % keep if keep else x["loop"])
        return {"y": y, "expert_idx": expert_idx, "latent": x["latent"][row], "k_rope": x["k_rope"][row]}

    return run


_STATE = ("h", "e", "h_out", "cumulative_p", "ponder", "running", "loop", "limit")
_PLACES = ("freqs", "sequence", "position", "first", "last", "latents", "k_ropes")
_WEIGHTS = ("lora", "step", "embeddings")


def _loop(call: Any):
    def run(eps_of_norm, **inputs) -> Outputs:
        blocks, x = _split(inputs)
        x["eps"] = eps_of_norm
        states = [x[name] for name in (*_STATE, *_PLACES)]
        load = call(*states, blocks, *(x[name] for name in _WEIGHTS), *(x[name] for name in _OPTIONS))
        first, last = _written(x)
        row = first + (last.long() % x["keep"] if x["keep"] else last.long())
        return {
            "load": load,
            **{name: x[name] for name in ("h", "h_out", "cumulative_p", "ponder", "running", "loop")},
            "last": last,
            "latents": torch.stack([pool[row] for pool in x["latents"]]),
            "k_ropes": torch.stack([pool[row] for pool in x["k_ropes"]]),
        }

    return run


def _hostile(inputs: Inputs) -> Inputs:
    """NaN in all rows of the pools that no row reads, and wild entries in the table behind the last row."""
    first, last, keep = inputs["first"].clone(), inputs["last"].clone(), inputs["keep"]
    sequence, position = inputs["sequence"], inputs["position"]
    before = last.clone()
    # What the rows' own tokens hold: the loops before this one; this loop's latent will be written.
    before[sequence, position] = inputs["loop"].int() - 1
    pools = [name for name in ("latent", "k_rope", "latents", "k_ropes") if name in inputs]
    held = torch.zeros(_count(inputs[pools[0]]), dtype=torch.bool, device=first.device)
    for s in range(len(first)):
        tokens = int(position[sequence == s].max()) + 1 if (sequence == s).any() else 0
        for j in range(tokens):
            ran = int(before[s, j]) + 1
            held[int(first[s, j]) : int(first[s, j]) + (min(ran, keep) if keep else ran)] = True
        first[s, tokens:], last[s, tokens:] = 1 << 30, -7

    def fresh(pool: Tensor) -> Tensor:
        return torch.where(held[:, None], pool, torch.full_like(pool, float("nan")))

    spoiled: Inputs = {
        n: [fresh(x) for x in inputs[n]] if isinstance(inputs[n], list) else fresh(inputs[n]) for n in pools
    }
    return {**inputs, "first": first, "last": last, **spoiled}


def _count(pool: Any) -> int:
    return len(pool[0] if isinstance(pool, list) else pool)


def _sizes(**other) -> dict:
    return (
        dict(
            rows=4,
            dim=24,
            sequences=2,
            tokens=9,
            depth=4,
            keep=0,
            heads=2,
            latent=12,
            q_rank=10,
            nope=6,
            rope=4,
            v=5,
            blocks=1,
            experts=3,
            topk=3,
            shared=1,
            inner=7,
            rank=2,
            trained=3,
            loops=3,
            spend_remainder=False,
            residual=False,
            freeze=True,
            act=True,
        )
        | other
    )


_CASES = {
    "plain": _sizes(),
    "some experts": _sizes(experts=9, topk=2, shared=2),
    "dense": _sizes(experts=0, topk=0, dim=33),
    "one row": _sizes(rows=1, tokens=1, sequences=1),
    "no rows": _sizes(rows=0),
    "two slots": _sizes(keep=2),
    "one latent per token": _sizes(keep=1),
    "a whole sequence": _sizes(rows=6, sequences=1, tokens=6),
    "odd sizes, wide": _sizes(rows=7, dim=131, latent=33, inner=41, heads=5, tokens=150, depth=2),
}
_RANGES = dict(
    rows=(1, 6), dim=(8, 70), heads=(1, 5), latent=(1, 40), q_rank=(1, 30), nope=(1, 12), v=(1, 12), inner=(1, 30)
)


def _fast_block(x, freqs, sequence, position, loop, first, last, latent, k_rope, blocks, keep):
    return block_rows(x, freqs, sequence, position, loop, first, last, latent, k_rope, blocks, keep=keep)


def _fast_loop(*args):
    return loop_rows(*args[: -len(_OPTIONS)], **dict(zip(_OPTIONS, args[-len(_OPTIONS) :])))


SPECIFICATIONS = [
    Specification(
        name="block_rows",
        backends=("cpu",),
        make=_make_block,
        fast=_block(_fast_block),
        reference=_block(by_formula.block_rows),
        differentiable=(),
        exact=("expert_idx",),
        cases=_CASES,
        ranges=_RANGES,
        hostile=_hostile,
    ),
    Specification(
        name="loop_rows",
        backends=("cpu",),
        make=_make_loop,
        fast=_loop(_fast_loop),
        reference=_loop(by_formula.loop_rows),
        differentiable=(),
        exact=("load", "running", "loop", "last"),
        chained=True,
        cases=_CASES
        | {
            "one loop": _sizes(loops=1),
            "no LoRA": _sizes(rank=0),
            "evolve": _sizes(freeze=False),
            "no halting": _sizes(act=False),
            "the rest at last": _sizes(rows=8, spend_remainder=True),
            "residual": _sizes(residual=True),
            "two blocks": _sizes(blocks=2),
        },
        ranges=_RANGES,
        hostile=_hostile,
    ),
    Specification(
        name="linear_rows",
        backends=("cpu",),
        make=_make_linear,
        fast=lambda x, weight: {"y": linear_rows(x, weight)},
        reference=lambda x, weight: {"y": linear(x, weight)},
        differentiable=(),
        cases={
            "plain": dict(rows=3, dim=40, outputs=70),
            "one row": dict(rows=1, dim=33, outputs=17),
            "many rows": dict(rows=37, dim=65, outputs=5),
            "no rows": dict(rows=0, dim=8, outputs=5),
        },
        ranges=dict(rows=(1, 40), dim=(1, 90), outputs=(1, 90)),
    ),
]
