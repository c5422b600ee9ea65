"""The specifications of all ops, which every test mode, `verify`, `compile` and the benchmarks' byte counts read."""

from __future__ import annotations

from openmythos_kernels.verify.description import Description
from openmythos_kernels.verify.specs import (
    layer_decode,
    layer_prompt,
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


def descriptions() -> list[Description]:
    """All ops of all families."""
    return [
        *layer_decode.DESCRIPTIONS,
        loop_step.DESCRIPTION,
        loop_lora_step.DESCRIPTION,
        loop_down.DESCRIPTION,
        *loop_compaction.DESCRIPTIONS,
        *mla_attention.DESCRIPTIONS,
        *mla_decode.DESCRIPTIONS,
        *moe_route.DESCRIPTIONS,
        *moe_experts.DESCRIPTIONS,
        *rms_norm.DESCRIPTIONS,
        *layer_prompt.DESCRIPTIONS,
    ]
