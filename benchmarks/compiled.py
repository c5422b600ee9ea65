"""The reference under torch.compile, the way a careful user would apply it.

`torch.compile(model)` cannot take the whole model: the experts' token counts
depend on data, and a cache whose keys are loop numbers makes every loop a
program of its own. So the functions between those points are compiled: what
comes before and behind the cache in the attention, the router, the experts,
the norms and the loop's update.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch._dynamo
from torch import Tensor

from openmythos import Expert, MLAttention, MoEFFN, RecurrentBlock, RMSNorm
from openmythos.attention import attend
from openmythos.cache import layer_cache

NOTE = (
    "the reference's attention (before and behind the cache), router, experts, norms and loop update, each under "
    "torch.compile in its default mode; the time to compile is not in the figures"
)


class CompiledAttention(MLAttention):
    """The reference's attention in two graphs, with the cache between them."""

    def forward(self, x, freqs_cis, mask=None, kv_cache=None, cache_key="default"):
        q, latent, k_rope = _before_cache(self, x, freqs_cis)
        entry = layer_cache(kv_cache, cache_key)
        if entry is not None:
            latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
        return _behind_cache(self, q, latent, k_rope, mask)


@torch.compile
def _before_cache(attention: MLAttention, x: Tensor, freqs_cis: Tensor):
    return attention.query(x, freqs_cis), *attention.latent(x, freqs_cis)


@torch.compile
def _behind_cache(attention: MLAttention, q: Tensor, latent: Tensor, k_rope: Tensor, mask) -> Tensor:
    k, v = attention.expand(latent, k_rope)
    return attention.wo(attend(q, k, v, mask, 0.0))


def compile_reference(model: torch.nn.Module) -> None:
    """Puts the compiled parts into a reference model (dropout 0), in place."""
    # Workloads, batch shapes and widths share these functions; the default limit would give up on some.
    torch._dynamo.config.recompile_limit = 64
    route, step = torch.compile(MoEFFN.route), torch.compile(RecurrentBlock.step)
    for module in model.modules():
        if type(module) is MLAttention:
            module.__class__ = CompiledAttention
        elif type(module) is MoEFFN:
            module.route = MethodType(route, module)
        elif type(module) is RecurrentBlock:
            module.step = MethodType(step, module)
        elif type(module) is Expert:
            module.compile(dynamic=True)  # every expert sees another number of tokens
        elif type(module) is RMSNorm:
            module.compile()
