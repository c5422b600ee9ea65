"""Drop-in modules: subclasses of the reference's, same parameters, faster forward."""

import openmythos.injection
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.block import TransformerBlock
from openmythos_kernels.nn.guards import watch
from openmythos_kernels.nn.halting import ACTHalting
from openmythos_kernels.nn.injection import LTIInjection
from openmythos_kernels.nn.model import OpenMythos
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.nn.recurrence import RecurrentBlock

watch(
    ACTHalting,
    LTIInjection,
    MLAttention,
    MoEFFN,
    OpenMythos,
    RecurrentBlock,
    TransformerBlock,
    openmythos.ACTHalting,
    openmythos.LTIInjection,
    openmythos.LoRAAdapter,
    openmythos.MLAttention,
    openmythos.MoEFFN,
    openmythos.OpenMythos,
    openmythos.RecurrentBlock,
    openmythos.TransformerBlock,
    openmythos.injection.ResidualInjection,
)

__all__ = ["ACTHalting", "LTIInjection", "MLAttention", "MoEFFN", "OpenMythos", "RecurrentBlock", "TransformerBlock"]
