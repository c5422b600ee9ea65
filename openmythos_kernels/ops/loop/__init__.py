"""The loop family: LoRA delta, injection, halting and the next loop's norm as one step."""

from openmythos_kernels.ops.loop.step import DTYPES, LoopStep, loop_step

__all__ = ["DTYPES", "LoopStep", "loop_step"]
