"""Drop-in modules: subclasses of the reference's, same parameters, faster forward."""

from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.injection import LTIInjection
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.nn.recurrence import RecurrentBlock

__all__ = ["LTIInjection", "MLAttention", "MoEFFN", "RecurrentBlock"]
