"""Drop-in modules: subclasses of the reference's, same parameters, faster forward."""

from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.block import TransformerBlock
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.nn.recurrence import RecurrentBlock

__all__ = ["MLAttention", "MoEFFN", "RecurrentBlock", "TransformerBlock"]
