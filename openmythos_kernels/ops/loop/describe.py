"""What the loop ops say of themselves; see `openmythos_kernels.verify.description`."""

from __future__ import annotations

from openmythos_kernels.ops.loop import describe_compaction
from openmythos_kernels.verify.description import Description

DESCRIPTIONS: list[Description] = [*describe_compaction.DESCRIPTIONS]
