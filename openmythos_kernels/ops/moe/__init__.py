"""Mixture of experts: routing, pairs sorted by expert, and SwiGLU experts applied to the tokens that chose them."""

from openmythos_kernels.ops.dtypes import FLOATS as DTYPES
from openmythos_kernels.ops.moe.experts import moe_experts
from openmythos_kernels.ops.moe.repeated import RepeatedExperts
from openmythos_kernels.ops.moe.route import moe_route
from openmythos_kernels.ops.moe.sort import Order, moe_sort, tile_bound

__all__ = ["DTYPES", "Order", "RepeatedExperts", "moe_experts", "moe_route", "moe_sort", "tile_bound"]
