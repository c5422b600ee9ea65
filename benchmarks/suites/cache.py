"""Bytes of KV cache per token and loop, measured on cache objects of the published sizes."""

from __future__ import annotations

import torch

from benchmarks.session import Requirement, Session
from benchmarks.upstream import load_upstream
from openmythos import KVCache, MLAttention, MythosConfig, variants
from openmythos_kernels import accelerate

SIZES = ("mythos_1b", "mythos_3b", "mythos_10b")
TOKENS = 16
LIMIT = 1 / 14  # of full multi-head keys and values


def run(session: Session) -> dict:
    rows, requirements = {}, []
    with session.progress.stage("cache: bytes per token and loop", len(SIZES)) as tick:
        for name in SIZES:
            rows[name] = measure(getattr(variants, name)())
            share = rows[name]["ours"] / rows[name]["full"]
            detail = f"{rows[name]['ours']:.0f} of {rows[name]['full']:.0f} bytes (float32): 1/{1 / share:.1f}"
            label = f"KV cache per token and loop, {name}"
            requirements.append(
                Requirement(label, LIMIT, share, "of full K/V", timing=False, higher=False, detail=detail)
            )
            tick()
    return {"tokens": TOKENS, "dtype": "float32", "rows": rows, "requirements": [r.as_dict() for r in requirements]}


@torch.no_grad()
def measure(cfg: MythosConfig) -> dict:
    """Bytes per token of one attention layer at one loop: ours, upstream's (or None), and full multi-head K/V."""
    x = torch.randn(1, TOKENS, cfg.dim)
    freqs_cis = torch.ones(TOKENS, cfg.qk_rope_head_dim // 2, dtype=torch.complex64)
    cache = KVCache(capacity=TOKENS)
    accelerate(MLAttention(cfg))(x, freqs_cis, None, cache, "layer")
    full = 2 * cfg.n_heads * (cfg.dim // cfg.n_heads) * x.element_size()
    return {"ours": cache.nbytes() / TOKENS, "upstream": upstream_bytes(cfg, x, freqs_cis), "full": full}


def upstream_bytes(cfg: MythosConfig, x: torch.Tensor, freqs_cis: torch.Tensor):
    try:
        upstream = load_upstream()
    except ImportError:
        return None
    held: dict = {}
    upstream.MLAttention(cfg)(x, freqs_cis, None, held, "layer")
    return sum(t.numel() * t.element_size() for t in held["layer"].values()) / TOKENS
