"""What the mla ops say of themselves; see `openmythos_kernels.verify.description`."""

from __future__ import annotations

from openmythos_kernels.ops.mla import describe_attention, describe_decode
from openmythos_kernels.verify.description import Description

DESCRIPTIONS: list[Description] = [*describe_attention.DESCRIPTIONS, *describe_decode.DESCRIPTIONS]
