"""The transformer block, and the core that the loop repeats."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from openmythos.attention import GQAttention, Mask, MLAttention
from openmythos.config import MythosConfig
from openmythos.layers import Expert, RMSNorm
from openmythos.moe import MoEFFN


class TransformerBlock(nn.Module):
    """Pre-norm attention and FFN, (B, T, dim) -> (B, T, dim)."""

    def __init__(self, cfg: MythosConfig, use_moe: bool = False):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim)
        self.ffn_norm = RMSNorm(cfg.dim)
        self.attn = MLAttention(cfg) if cfg.attn_type == "mla" else GQAttention(cfg)
        self.ffn = MoEFFN(cfg) if use_moe else Expert(cfg.dim, cfg.dense_dim)
        self.resid_drop = nn.Dropout(cfg.dropout)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        x = x + self.resid_drop(self.attn(self.attn_norm(x), freqs_cis, mask, kv_cache, cache_key))
        return x + self.resid_drop(self.ffn(self.ffn_norm(x)))


class BlockStack(nn.ModuleList):
    """Several blocks in a row, called like one; block i uses the cache entry `{cache_key}.{i}`."""

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        for i, block in enumerate(self):
            x = block(x, freqs_cis, mask, kv_cache, f"{cache_key}.{i}")
        return x


def make_core(cfg: MythosConfig) -> nn.Module:
    """The core of the loop: one block, with upstream's parameter names, or a stack of core_layers."""
    blocks = [TransformerBlock(cfg, use_moe=cfg.core_ffn == "moe") for _ in range(cfg.core_layers)]
    return blocks[0] if cfg.core_layers == 1 else BlockStack(blocks)
