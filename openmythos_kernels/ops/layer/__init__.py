"""Whole layers as one op, without gradients: one token per row (decoding), or a prompt whose sequences threads share
out."""

from openmythos_kernels.ops.layer.block_decode import BlockWeights, block_decode
from openmythos_kernels.ops.layer.block_prompt import block_prompt
from openmythos_kernels.ops.layer.loop_decode import LoopDecode, loop_decode

__all__ = ["BlockWeights", "LoopDecode", "block_decode", "block_prompt", "loop_decode"]
