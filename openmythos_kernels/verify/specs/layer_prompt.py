"""Specification of `block_prompt`. The truth is the reference's module, with the inputs as its parameters."""

from __future__ import annotations

import torch

import openmythos
from openmythos.attention import CausalMask
from openmythos_kernels.ops.layer import FfnWeights, block_prompt
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer
from openmythos_kernels.verify.specs.layer_decode import config, make_blocks, parameters
from openmythos_kernels.verify.specs.mla_attention import angles


def _make(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    B, T, D = sizes["rows"], sizes["tokens"], sizes["dim"]
    weights = make_blocks({"blocks": 1, "experts": 0, "topk": 0, **sizes}, dtype, device, draw)
    ffn = [weights[f"shared_{name}"][0] for name in FfnWeights._fields] if sizes["dense"] else []
    kept = {name: weights[name] for name in ("attention", "n_heads", "nope", "rope", "v", "eps")}
    freqs = angles(1, T, sizes["rope"], device)
    if sizes["own places"]:  # another step for each row: attention does not depend on where a row begins
        line = angles(1, B * T, sizes["rope"], device)[0]
        freqs = torch.stack([line[: T * step : step] for step in range(1, B + 1)])
    return dict(x=draw(B, T, D), freqs=freqs, ffn=ffn, causal=sizes["causal"], **kept)


def _fast(**inputs) -> Outputs:
    y, normed = block_prompt(**inputs)
    return {"y": y, "normed": normed}


def _reference(x, freqs, attention, ffn, causal, **sizes) -> Outputs:
    shared = ffn or [x.new_zeros(1, x.shape[-1])] * 2 + [x.new_zeros(x.shape[-1], 1)]
    blocks = dict(attention=attention, router=[], gate=[], topk=0, **sizes)
    blocks |= {f"shared_{name}": [weight] for name, weight in zip(FfnWeights._fields, shared)}
    with torch.device("meta"):
        module = openmythos.TransformerBlock(config(blocks, 1)).eval()
    mask = CausalMask(0, x.shape[1]) if causal else None
    named = parameters(blocks, 0, 1)
    y = torch.func.functional_call(module, named, (x, torch.view_as_complex(freqs), mask))
    behind = {"weight": named["ffn_norm.weight"]}
    normed = x.new_empty(0) if ffn else torch.func.functional_call(module.ffn_norm, behind, (y,))
    return {"y": y, "normed": normed}


_CASE = {
    "rows": 2,
    "tokens": 9,
    "dim": 24,
    "heads": 2,
    "latent": 12,
    "q_rank": 10,
    "nope": 6,
    "rope": 4,
    "v": 5,
    "inner": 7,
    "dense": True,
    "causal": True,
    "own places": False,
}

SPECIFICATIONS = [
    Specification(
        name="block_prompt",
        backends=("cpu",),
        make=_make,
        fast=_fast,
        reference=_reference,
        differentiable=(),
        dtypes=(torch.float32,),
        cases={
            "plain": _CASE,
            "attention alone": _CASE | {"dense": False},
            "own places": _CASE | {"rows": 4, "own places": True},
            "all see all": _CASE | {"causal": False},
            "uneven shares": _CASE | {"rows": 5, "tokens": 13, "dim": 131, "latent": 33, "inner": 41, "heads": 5},
            "one sequence": _CASE | {"rows": 1, "tokens": 70},
            "one token each": _CASE | {"rows": 16, "tokens": 1},
            "no sequence": _CASE | {"rows": 0},
        },
        ranges=dict(
            rows=(0, 6),
            tokens=(1, 40),
            dim=(8, 70),
            heads=(1, 5),
            latent=(1, 40),
            q_rank=(1, 30),
            nope=(1, 12),
            v=(1, 12),
        ),
    )
]
