"""The specification of `loop_step`."""

from __future__ import annotations

from typing import Any

import torch

import openmythos
from openmythos import variants
from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.loop.step import LoopStep, loop_step
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer

DIFFERENTIABLE = (
    "h",
    "e",
    "f",
    "lora_hidden",
    "h_out",
    "cumulative_p",
    "ponder",
    "lora_B",
    "log_A",
    "log_dt",
    "B",
    "halt_weight",
    "halt_bias",
    "norm_weight",
)


def make(sizes: Sizes, dtype, device, generator) -> Inputs:
    """Sizes: tokens, dim, rank; halting ("some", "none", "all"); spend_remainder, enter; loop."""
    N, D, rank = sizes["tokens"], sizes["dim"], sizes["rank"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    normal = drawer(dtype, device, generator)

    def uniform(*shape: int):
        if generator is None:
            return torch.empty(shape, dtype=wide, device=device)
        return torch.rand(shape, device=device, generator=generator).to(wide)

    halting = sizes.get("halting", "some")
    bias = {"some": 0.0, "none": -8.0, "all": 8.0, "before": 0.0}[halting]
    # Each position's sum of probabilities is far from the threshold, so that no rounding decides whether it halts.
    cumulative_p = 0.1 * uniform(N)
    if halting in ("some", "before"):
        cumulative_p = cumulative_p + 0.6 * (uniform(N) < 0.5)
    return dict(
        h=normal(N, D),
        e=normal(N, D),
        f=normal(N, D),
        lora_hidden=normal(N, rank),
        h_out=normal(N, D),
        cumulative_p=cumulative_p,
        running=uniform(N) < {"some": 0.8, "before": -1.0}.get(halting, 2.0),
        ponder=uniform(N),
        lora_B=normal(rank, D, scale=0.3),
        log_A=normal(D, scale=0.5),
        log_dt=normal(1, scale=0.5),
        B=normal(D),
        halt_weight=normal(1, D, scale=0.03 * D**-0.5),
        halt_bias=torch.full((1,), bias, dtype=dtype, device=device),
        norm_weight=normal(D),
        emb=normal(D // 8),
        loop=sizes.get("loop", 1),
        threshold=0.7,
        spend_remainder=sizes.get("spend_remainder", False),
        enter=sizes.get("enter", True),
        eps=1e-6,
    )


def named(out: LoopStep, enter: bool) -> Outputs:
    """The step's results; u only where it is made."""
    return {name: x for name, x in out._asdict().items() if enter or name != "u"}


def reference(**inputs: Any) -> Outputs:
    return named(LoopStep(*formula.step(**inputs)[:6]), inputs["enter"])


def _shipped() -> dict[str, Sizes]:
    """Widths and LoRA ranks of the published variants, with 4096 tokens each."""
    sizes: dict[str, Sizes] = {}
    for name, make_config in variants.VARIANTS.items():
        cfg = make_config()
        if isinstance(cfg, openmythos.MythosConfig) and cfg.injection == "mythos":
            sizes[name] = dict(tokens=4096, dim=cfg.dim, rank=cfg.lora_rank)
    return sizes


SPECIFICATION = Specification(
    name="loop_step",
    backends=("cpu", "triton", "cuda"),
    make=make,
    fast=lambda **inputs: named(loop_step(**inputs), inputs["enter"]),
    reference=reference,
    differentiable=DIFFERENTIABLE,
    exact=("running",),
    cases={
        "plain": dict(tokens=37, dim=64, rank=8),
        "odd sizes": dict(tokens=13, dim=97, rank=5),
        "last loop": dict(tokens=9, dim=48, rank=3, enter=False, spend_remainder=True, loop=3),
        "one position": dict(tokens=1, dim=31, rank=1),
        "no position": dict(tokens=0, dim=24, rank=2),
        "no LoRA": dict(tokens=6, dim=40, rank=0),
        "nothing halts": dict(tokens=7, dim=32, rank=2, halting="none", loop=0),
        "all halt at loop 0": dict(tokens=7, dim=32, rank=2, halting="all", loop=0),
        "all had halted": dict(tokens=7, dim=32, rank=2, halting="before"),
        "wider than a program": dict(tokens=3, dim=4100, rank=1),
        "past the trained depth": dict(tokens=5, dim=24, rank=2, loop=40),
    },
    ranges={"tokens": (1, 40), "dim": (8, 200), "rank": (0, 12)},
    shipped=_shipped(),
)
