"""Prompts through a whole layer as one op, without gradients: sequences are independent, so each thread takes its own all the way."""

from openmythos_kernels.ops.prompt.block import block_prompt

__all__ = ["block_prompt"]
