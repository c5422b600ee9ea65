"""Recurrent-Depth Transformers in readable PyTorch: the reference of `openmythos_kernels`.

Parameter names and results are those of the public `open-mythos` package.
"""

from openmythos.attention import CausalMask, GQAttention, MLAttention
from openmythos.baseline import DenseConfig, DenseTransformer
from openmythos.block import TransformerBlock
from openmythos.cache import KVCache, LayerCache
from openmythos.config import MythosConfig
from openmythos.generate import generate, stream
from openmythos.injection import LTIInjection
from openmythos.layers import Expert, RMSNorm, apply_rope, precompute_rope_freqs
from openmythos.model import OpenMythos
from openmythos.moe import MoEFFN, update_router_bias
from openmythos.recurrence import ACTHalting, LoRAAdapter, RecurrentBlock
from openmythos.routing import RoutingStats, plot_routing, recording_routing, routing_stats

__all__ = [
    "ACTHalting",
    "CausalMask",
    "DenseConfig",
    "DenseTransformer",
    "Expert",
    "GQAttention",
    "KVCache",
    "LTIInjection",
    "LayerCache",
    "LoRAAdapter",
    "MLAttention",
    "MoEFFN",
    "MythosConfig",
    "OpenMythos",
    "RMSNorm",
    "RecurrentBlock",
    "RoutingStats",
    "TransformerBlock",
    "apply_rope",
    "generate",
    "plot_routing",
    "precompute_rope_freqs",
    "recording_routing",
    "routing_stats",
    "stream",
    "update_router_bias",
]
