"""The jobs of `python -m openmythos_kernels tune`: latent attention with the published variants' heads, in bfloat16."""

from __future__ import annotations

from functools import partial

import torch

from openmythos.variants import VARIANTS
from openmythos_kernels.ops.mla import configs
from openmythos_kernels.ops.mla.attention import mla_attention, mla_attention_backward
from openmythos_kernels.ops.mla.latent import mla_attend_latent
from openmythos_kernels.runtime.tuning import Job


def jobs(device: str = "cuda", tokens: int = 2048, cached: int = 8192, rows: int = 4) -> list[Job]:
    """Forward, dq and dkv for every shape of a head; decoding for every number of heads and width of a latent."""
    found: dict[str, Job] = {}
    for variant in VARIANTS.values():
        cfg = variant()
        nope, rope, v, r = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank

        def random(*shape):
            # Not zeros: they cost a GPU less power, and so less time.
            return torch.randn(*shape, dtype=torch.bfloat16, device=device)

        heads = min(cfg.n_heads, 16)
        x = random(1, tokens, heads, nope), random(1, tokens, heads, rope), random(1, tokens, heads, nope + v)
        inputs = (*x, random(1, tokens, rope), *(torch.full((1,), n, device=device) for n in (0, tokens)))
        out, lse = random(1, tokens, heads, v), torch.full((1, heads, tokens), 10.0, device=device)
        for kernel in configs.KERNELS:
            what = f"mla_attention {kernel} 2 {nope} {rope} {v}"
            if kernel == "forward":
                found[what] = Job(what, configs.candidates(kernel), partial(mla_attention, *inputs))
            else:
                backward = partial(mla_attention_backward, out, *inputs, out, lse)
                found[what] = Job(what, configs.candidates(kernel), backward)
        q = random(rows, cfg.n_heads, r), random(rows, cfg.n_heads, rope)
        cache = random(rows, cached, r), random(rows, cached, rope), torch.full((rows,), cached, device=device)
        what = f"mla_attend_latent 2 {cfg.n_heads} {r}"
        decoding = partial(mla_attend_latent, *q, *cache, None, 0.1)
        found[what] = Job(what, configs.latent_candidates(cfg.n_heads, r), decoding)
    return list(found.values())
