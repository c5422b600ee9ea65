"""The loop family: LoRA delta, injection, halting and the next loop's norm as one step."""

from openmythos_kernels.ops.loop.compaction import Active, compact_active, gather_rows, scatter_rows
from openmythos_kernels.ops.loop.exit import ExitCounter
from openmythos_kernels.ops.loop.step import DTYPES, LoopStep, loop_step

__all__ = [
    "Active", "DTYPES", "ExitCounter", "LoopStep", "compact_active", "gather_rows", "loop_step", "scatter_rows",
]  # fmt: skip
