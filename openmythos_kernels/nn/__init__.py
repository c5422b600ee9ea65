"""Drop-in modules: subclasses of the reference's, same parameters, faster forward."""

from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.block import TransformerBlock
from openmythos_kernels.nn.halting import ACTHalting
from openmythos_kernels.nn.injection import LTIInjection
from openmythos_kernels.nn.model import OpenMythos
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.nn.recurrence import RecurrentBlock

__all__ = ["ACTHalting", "LTIInjection", "MLAttention", "MoEFFN", "OpenMythos", "RecurrentBlock", "TransformerBlock"]
