"""One token per row through whole layers, each a single op: decoding's small calls cost less than what Python spends on them."""

from openmythos_kernels.ops.decode.block import BlockWeights, block_decode
from openmythos_kernels.ops.decode.loop import LoopDecode, loop_decode

__all__ = ["BlockWeights", "LoopDecode", "block_decode", "loop_decode"]
