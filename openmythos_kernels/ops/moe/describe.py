"""What the moe ops say of themselves; see `openmythos_kernels.verify.description`."""

from __future__ import annotations

from openmythos_kernels.ops.moe import describe_experts, describe_route
from openmythos_kernels.verify.description import Description

DESCRIPTIONS: list[Description] = [*describe_route.DESCRIPTIONS, *describe_experts.DESCRIPTIONS]
