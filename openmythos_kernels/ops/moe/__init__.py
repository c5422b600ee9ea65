"""Mixture of experts: SwiGLU experts applied to the tokens that chose them."""

from openmythos_kernels.ops.moe.experts import DTYPES, moe_experts

__all__ = ["DTYPES", "moe_experts"]
