"""Multi-head latent attention (MLA) and grouped-query attention (GQA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openmythos.cache import LayerCache, layer_cache
from openmythos.config import MythosConfig
from openmythos.layers import RMSNorm, apply_rope


class CausalMask:
    """A causal mask as two numbers: query i of row b sits at position start[b] + i and sees the keys up to it.

    The model passes this instead of a (T, S) tensor, so a fast module knows a mask to be causal without reading it.

    Args:
        start: position of the first query, an int or one per row.
        tokens: number of queries, T.
    """

    def __init__(self, start: int | Sequence[int], tokens: int):
        self.start = start
        self.tokens = tokens

    @property
    def sees_all(self) -> bool:
        """Whether nothing is hidden: one query, at the end of rows of equal length."""
        return self.tokens == 1 and isinstance(self.start, int)

    def additive(self, keys: int, like: Tensor) -> Tensor:
        """(1 or B, 1, T, keys): 0 where a key is visible, -inf elsewhere. `like` gives dtype and device."""
        first = torch.as_tensor(self.start, device=like.device).reshape(-1, 1, 1, 1)
        query = first + torch.arange(self.tokens, device=like.device)[:, None]
        hidden = torch.arange(keys, device=like.device) > query
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


Mask = CausalMask | Tensor | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """Softmax attention: q (B, T, H, d), k (B, S, H, d), v (B, S, H, dv) -> (B, T, H * dv).

    `dropout` is applied to the attention weights.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    score = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if isinstance(mask, CausalMask):
        mask = None if mask.sees_all else mask.additive(k.shape[2], score)
    if mask is not None:
        score = score + mask.to(score.dtype)
    return (dropout(score.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class MLAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024).

    Keys and values are projections of one latent vector per token, and all heads share one rotary key. The cache keeps
    only these two: the normed latent and the rotated key.
    """

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.kv_lora_rank = cfg.kv_lora_rank
        self.qk_rope_dim = cfg.qk_rope_head_dim
        self.qk_nope_dim = cfg.qk_nope_head_dim
        self.v_dim = cfg.v_head_dim
        self.q_head_dim = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim

        self.q_down = nn.Linear(cfg.dim, cfg.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(cfg.q_lora_rank)
        self.q_up_nope = nn.Linear(cfg.q_lora_rank, cfg.n_heads * cfg.qk_nope_head_dim, bias=False)
        self.q_up_rope = nn.Linear(cfg.q_lora_rank, cfg.n_heads * cfg.qk_rope_head_dim, bias=False)
        self.kv_down = nn.Linear(cfg.dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank)
        self.kv_up = nn.Linear(cfg.kv_lora_rank, cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.v_head_dim, cfg.dim, bias=False)
        self.attn_drop = nn.Dropout(cfg.dropout)

    def query(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        """Queries (B, T, H, nope + rope) of x (B, T, dim); the last `rope` channels are rotated."""
        c_q = self.q_norm(self.q_down(x))
        nope = self.q_up_nope(c_q).unflatten(-1, (self.n_heads, self.qk_nope_dim))
        rope = self.q_up_rope(c_q).unflatten(-1, (self.n_heads, self.qk_rope_dim))
        return torch.cat((nope, apply_rope(rope, freqs_cis)), dim=-1)

    def latent(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache keeps of x (B, T, dim): normed latent (B, T, r) and rotated shared key (B, T, rope)."""
        c_kv, k_rope = self.kv_down(x).split((self.kv_lora_rank, self.qk_rope_dim), dim=-1)
        return self.kv_norm(c_kv), apply_rope(k_rope.unsqueeze(2), freqs_cis).squeeze(2)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, nope + rope) and values (B, S, H, v) of every head, from what the cache keeps."""
        kv = self.kv_up(latent).unflatten(-1, (self.n_heads, self.qk_nope_dim + self.v_dim))
        k_nope, v = kv.split((self.qk_nope_dim, self.v_dim), dim=-1)
        shared = k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)
        return torch.cat((k_nope, shared), dim=-1), v

    @torch.no_grad()
    def taken_over(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """An open-mythos cache entry in this layer's form: c_kv (B, S, r) is normed, k_rope (B, S, H, rope) loses H.

        Raises:
            ValueError: for other names, or rotary keys that differ between heads.
        """
        if theirs.keys() != {"c_kv", "k_rope"} or not (theirs["k_rope"] == theirs["k_rope"][:, :, :1]).all():
            raise ValueError(
                f"kv_cache: an entry holds {sorted(theirs)}: must be a LayerCache, or open-mythos' c_kv and k_rope"
            )
        return {"latent": self.kv_norm(theirs["c_kv"]), "k_rope": theirs["k_rope"][:, :, 0]}

    def projected(self, x: Tensor, freqs_cis: Tensor, entry: LayerCache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x per head. A cache entry is extended by x; keys and values are then all of
        its."""
        q = self.query(x, freqs_cis)
        latent, k_rope = self.latent(x, freqs_cis)
        if entry is not None:
            latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
        return q, *self.expand(latent, k_rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """The function `attend`, with this module's dropout."""
        return attend(q, k, v, mask, self.attn_drop)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """
        Args:
            x: (B, T, dim).
            freqs_cis: complex64 (T, rope // 2), or (B, T, rope // 2) for rows at different positions.
            mask: a CausalMask, an additive tensor broadcastable to (B, H, T, S), or None (nothing is hidden).
            kv_cache: mapping whose entry `cache_key` gets the new tokens appended; see `openmythos.cache`.

        Returns:
            (B, T, dim).
        """
        entry = layer_cache(kv_cache, cache_key, self.taken_over)
        return self.wo(self.attend(*self.projected(x, freqs_cis, entry), mask))


class GQAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023): each key/value head serves n_heads // n_kv_heads queries."""

    def __init__(self, cfg: MythosConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.n_kv_heads = cfg.n_kv_heads
        self.head_dim = cfg.dim // cfg.n_heads
        self.groups = cfg.n_heads // cfg.n_kv_heads
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * self.head_dim, cfg.dim, bias=False)
        self.dropout_p = cfg.dropout

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask = None, kv_cache: dict | None = None, cache_key: str = "default"
    ) -> Tensor:
        """As `MLAttention.forward`, with freqs_cis of the whole head: (T, head_dim // 2) or (B, T, head_dim // 2)."""
        q = apply_rope(self.wq(x).unflatten(-1, (self.n_heads, self.head_dim)), freqs_cis)
        k = apply_rope(self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim)), freqs_cis)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        entry = layer_cache(kv_cache, cache_key, dict)
        if entry is not None:
            k, v = entry.append(k=k, v=v)
        k, v = (y.repeat_interleave(self.groups, dim=2) for y in (k, v))
        return self.wo(attend(q, k, v, mask, lambda weight: F.dropout(weight, self.dropout_p, self.training)))
