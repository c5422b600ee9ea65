"""Whole layers as one op, without gradients: one token per row (decoding), independent tokens at loops of their own, or
whole prompts. Those over independent tokens run on any device, those that decode a token per row on a CPU and a GPU,
the others on a CPU."""

from openmythos_kernels.ops.layer.block_decode import block_decode
from openmythos_kernels.ops.layer.block_prompt import block_prompt
from openmythos_kernels.ops.layer.block_rows import block_rows
from openmythos_kernels.ops.layer.linear_rows import linear_rows
from openmythos_kernels.ops.layer.loop_decode import LoopDecode, loop_decode
from openmythos_kernels.ops.layer.loop_rows import loop_rows
from openmythos_kernels.ops.layer.weights import (
    AttentionWeights,
    BlockWeights,
    Eps,
    FfnWeights,
    LoraWeights,
    RouterWeights,
    StepWeights,
)

__all__ = [
    "AttentionWeights",
    "BlockWeights",
    "Eps",
    "FfnWeights",
    "LoopDecode",
    "LoraWeights",
    "RouterWeights",
    "StepWeights",
    "block_decode",
    "block_prompt",
    "block_rows",
    "linear_rows",
    "loop_decode",
    "loop_rows",
]
