"""Whole layers as one op, on the CPU and without gradients: one token per row (decoding), or whole prompts."""

from openmythos_kernels.ops.layer.block_decode import block_decode
from openmythos_kernels.ops.layer.block_prompt import block_prompt
from openmythos_kernels.ops.layer.loop_decode import LoopDecode, loop_decode
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
    "loop_decode",
]
