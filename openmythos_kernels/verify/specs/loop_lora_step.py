"""The specification of `loop_lora_step`: `loop_step` with two weights in place of the LoRA's coordinates."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from openmythos_kernels.ops.loop.lora_step import loop_lora_step
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, drawer
from openmythos_kernels.verify.specs import loop_step as step_spec

WEIGHTS = ("down", "scale")


def _make(sizes: Sizes, dtype, device, generator) -> Inputs:
    inputs = step_spec.make(sizes, dtype, device, generator)
    del inputs["lora_hidden"]
    draw, rank, D = drawer(dtype, device, generator), sizes["rank"], sizes["dim"]
    return dict(inputs, down=draw(rank, D, scale=D**-0.5), scale=draw(rank))


def _reference(f: Tensor, down: Tensor, scale: Tensor, **inputs: Any) -> Outputs:
    return step_spec.reference(f=f, lora_hidden=f @ down.t() * scale, **inputs)


_STEP = step_spec.SPECIFICATION
SPECIFICATION = dataclasses.replace(
    _STEP,
    name="loop_lora_step",
    backends=("cpu",),
    make=_make,
    fast=lambda **inputs: step_spec.named(loop_lora_step(**inputs), inputs["enter"]),
    reference=_reference,
    differentiable=tuple(n for name in _STEP.differentiable for n in (WEIGHTS if name == "lora_hidden" else (name,))),
)
