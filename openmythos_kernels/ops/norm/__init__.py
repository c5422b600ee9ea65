"""RMSNorm, alone or with the residual addition before it."""

from openmythos_kernels.ops.dtypes import FLOATS as DTYPES
from openmythos_kernels.ops.norm.rms_norm import add_rms_norm, rms_norm

__all__ = ["DTYPES", "add_rms_norm", "rms_norm"]
