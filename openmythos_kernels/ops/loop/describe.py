"""What the loop ops say of themselves; see `openmythos_kernels.verify.description`."""

from __future__ import annotations

from openmythos_kernels.ops.loop import describe_compaction, describe_down, describe_lora_step, describe_step
from openmythos_kernels.verify.description import Description

DESCRIPTIONS: list[Description] = [
    describe_step.DESCRIPTION,
    describe_lora_step.DESCRIPTION,
    describe_down.DESCRIPTION,
    *describe_compaction.DESCRIPTIONS,
]
