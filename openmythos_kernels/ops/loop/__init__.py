"""The loop: LoRA, injection, halting and the next loop's norm as one step; compaction of the running positions."""

from openmythos_kernels.ops.dtypes import FLOATS as DTYPES
from openmythos_kernels.ops.loop.compaction import Active, compact_active, gather_rows, scatter_rows
from openmythos_kernels.ops.loop.down import loop_down
from openmythos_kernels.ops.loop.exit import ExitCounter
from openmythos_kernels.ops.loop.lora_step import loop_lora_step
from openmythos_kernels.ops.loop.parts import act_update, inject_norm, lti_update, nothing_runs
from openmythos_kernels.ops.loop.step import LoopStep, loop_step

__all__ = [
    "DTYPES",
    "Active",
    "ExitCounter",
    "LoopStep",
    "act_update",
    "compact_active",
    "gather_rows",
    "inject_norm",
    "loop_down",
    "loop_lora_step",
    "loop_step",
    "lti_update",
    "nothing_runs",
    "scatter_rows",
]
