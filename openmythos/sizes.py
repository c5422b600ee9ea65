"""The cost of a configuration: parameters, active parameters, FLOPs and cache bytes per token.

Counted on modules on the meta device, so the model's own code says what there is to count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from openmythos.baseline import DenseConfig, DenseTransformer
from openmythos.config import MythosConfig
from openmythos.model import OpenMythos
from openmythos.moe import MoEFFN


@dataclass
class Size:
    """The cost of one configuration, at the configured number of loops.

    Attributes:
        parameters: of the whole model.
        active_parameters: those that one token uses: K of E experts; a looped block counts once.
        flops: of the forward pass per token. A multiply-add counts 2; attention is over half the context, the mean of
            a causal pass.
        cache_bytes: per token, all layers and loops.
        entry_bytes: per token, one layer at one loop.
        full_entry_bytes: the same for full multi-head keys and values, 2 * n_heads * head_dim.
    """

    parameters: int
    active_parameters: int
    flops: float
    cache_bytes: int
    entry_bytes: int
    full_entry_bytes: int


def build(cfg: MythosConfig) -> nn.Module:
    """The model of a configuration."""
    return DenseTransformer(cfg) if isinstance(cfg, DenseConfig) else OpenMythos(cfg)


def outline(cfg: MythosConfig) -> nn.Module:
    """The model of a configuration on the meta device: shapes and dtypes, no numbers."""
    with torch.device("meta"), _Unfilled():
        return build(cfg)


class _Unfilled(TorchFunctionMode):
    """Skips torch.nn.init: without numbers it has no effect, yet it takes most of a construction's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def measure(cfg: MythosConfig, itemsize: int = 2) -> Size:
    """The cost of `cfg`; `itemsize` is the bytes of a cached number (2: bfloat16)."""
    model = outline(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    looped: list[nn.Module] = []
    if isinstance(cfg, DenseConfig):
        loops, layers = 1, cfg.n_layers
    else:
        looped, loops = [model.get_submodule("recurrent")], cfg.max_loop_iters
        layers = cfg.prelude_layers + cfg.coda_layers + cfg.core_layers * loops

    def matrices(module: nn.Module) -> int:
        """Elements of the weight matrices that one token is multiplied with."""
        idle = sum(p.numel() for p in _idle_experts(module))
        return sum(p.numel() for p in module.parameters() if p.dim() == 2) - idle

    if cfg.attn_type == "mla":
        per_pair = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
        entry = (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * itemsize
    else:
        per_pair = 2 * cfg.dim
        entry = 2 * cfg.n_kv_heads * (cfg.dim // cfg.n_heads) * itemsize
    # The embedding lookup multiplies nothing, but its matrix is also the head's, so it counts once.
    per_pass = matrices(model) + (loops - 1) * sum(matrices(module) for module in looped)
    return Size(
        parameters=parameters,
        active_parameters=parameters - sum(p.numel() for p in _idle_experts(model)),
        flops=2.0 * per_pass + 2.0 * per_pair * layers * cfg.max_seq_len / 2,
        cache_bytes=entry * layers,
        entry_bytes=entry,
        full_entry_bytes=2 * cfg.n_heads * (cfg.dim // cfg.n_heads) * itemsize,
    )


def _idle_experts(model: nn.Module):
    """Parameters of the routed experts that a token does not use."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            for expert in module.routed_experts[module.topk :]:
                yield from expert.parameters()


def table(variants: dict) -> str:
    """A table of the costs of named configurations; `variants` maps names to functions that return configs."""
    rows = [("size", "parameters", "active", "loops", "context", "GFLOP/token", "cache B/token", "B/entry", "full K/V")]
    for name, make in variants.items():
        cfg = make()
        size = measure(cfg)
        rows.append(
            (
                name,
                f"{size.parameters / 1e9:.3f} B",
                f"{size.active_parameters / 1e9:.3f} B",
                "-" if isinstance(cfg, DenseConfig) else str(cfg.max_loop_iters),
                f"{cfg.max_seq_len:,}",
                f"{size.flops / 1e9:,.1f}",
                f"{size.cache_bytes:,}",
                f"{size.entry_bytes:,}",
                f"{size.full_entry_bytes / size.entry_bytes:.1f}x",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    ]
    return "\n".join(lines)
