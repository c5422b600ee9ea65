"""The specifications of all ops, which every test mode, `verify`, `compile` and the benchmarks' byte counts read."""

from __future__ import annotations

from openmythos_kernels.verify.specification import Specification
from openmythos_kernels.verify.specs import (
    layer_decode,
    layer_prompt,
    layer_rows,
    loop_compaction,
    loop_down,
    loop_lora_step,
    loop_step,
    mla_attention,
    mla_decode,
    moe_experts,
    moe_route,
    rms_norm,
)


def specifications() -> list[Specification]:
    """All ops of all families."""
    return [
        *layer_decode.SPECIFICATIONS,
        *layer_rows.SPECIFICATIONS,
        loop_step.SPECIFICATION,
        loop_lora_step.SPECIFICATION,
        loop_down.SPECIFICATION,
        *loop_compaction.SPECIFICATIONS,
        *mla_attention.SPECIFICATIONS,
        *mla_decode.SPECIFICATIONS,
        *moe_route.SPECIFICATIONS,
        *moe_experts.SPECIFICATIONS,
        *rms_norm.SPECIFICATIONS,
        *layer_prompt.SPECIFICATIONS,
    ]
