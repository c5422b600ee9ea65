"""Drop-in modules: subclasses of the reference's, same parameters, faster forward."""

import openmythos.injection
from openmythos_kernels.nn.attention import MLAttention
from openmythos_kernels.nn.block import TransformerBlock
from openmythos_kernels.nn.guards import stand_in, watch
from openmythos_kernels.nn.model import OpenMythos
from openmythos_kernels.nn.moe import MoEFFN
from openmythos_kernels.nn.recurrence import RecurrentBlock

_STAND_INS = {
    openmythos.MLAttention: MLAttention,
    openmythos.MoEFFN: MoEFFN,
    openmythos.TransformerBlock: TransformerBlock,
    openmythos.RecurrentBlock: RecurrentBlock,
    openmythos.OpenMythos: OpenMythos,
}
for _reference, _fast in _STAND_INS.items():
    stand_in(_fast, _reference)
watch(
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
    openmythos.injection.ParcaeInjection,
    openmythos.injection.ResidualInjection,
)

__all__ = ["MLAttention", "MoEFFN", "OpenMythos", "RecurrentBlock", "TransformerBlock"]
