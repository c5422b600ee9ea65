"""The reference under torch.compile, the way a careful user would apply it.

`torch.compile(model)` cannot take the whole model: the experts' token counts
depend on data, and the loop number picks cache entries and LoRA scales, which
makes every loop a program of its own. So what lies between those points is
compiled: a block before and behind the cache, and the loop's update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmythos import MLAttention, OpenMythos, RecurrentBlock, TransformerBlock
from openmythos.cache import layer_cache
from openmythos.recurrence import act_update

NOTE = (
    "torch.compile (default mode) on norms and attention before and behind the cache, and on the loop's update; "
    "experts and Python control flow stay eager; the time to compile is not in the figures"
)


class CompiledBlock(TransformerBlock):
    """The reference's block: two graphs with the cache between them, then the experts."""

    def forward(self, x, freqs_cis, mask=None, kv_cache=None, cache_key="default"):
        q, latent, k_rope = _before_cache(self.attn_norm, self.attn, x, freqs_cis)
        entry = layer_cache(kv_cache, cache_key)
        if entry is not None:
            latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
        x, y = _behind_cache(self.attn, self.ffn_norm, x, q, latent, k_rope, mask)
        return x + self.ffn(y)


class CompiledLoop(RecurrentBlock):
    """The reference's loop, its update one graph for all loops: their number goes in as a tensor, and a view
    hides that the first state is e itself, which would need a graph of its own."""

    def step(self, h, e, u, f, state, t, last):
        return _update(self, h.view_as(h), e, u, f + self.lora(f, t), state, torch.tensor(t, device=h.device))


@torch.compile
def _before_cache(norm: nn.Module, attn: MLAttention, x: Tensor, freqs_cis: Tensor):
    x = norm(x)
    return attn.query(x, freqs_cis), *attn.latent(x, freqs_cis)


@torch.compile
def _behind_cache(attn: MLAttention, norm: nn.Module, x: Tensor, q: Tensor, latent: Tensor, k_rope: Tensor, mask):
    x = x + attn.wo(attn.attend(q, *attn.expand(latent, k_rope), mask))
    return x, norm(x)


@torch.compile
def _update(loop: RecurrentBlock, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state, t: Tensor):
    new = loop.injection.update(h, e, u, f)
    state = act_update(state, new, loop.act(new), t, loop.cfg.act_threshold, False)
    # Made behind the last loop too, for nobody: it costs less than a second graph for that loop takes to compile.
    return new, state, loop.injection.enter(new, e, t + 1, loop.norm)


def compile_reference(model: OpenMythos) -> None:
    """Puts the compiled parts into a reference model with MLA, LoRA, evolve halting and no dropout, in place."""
    # Training, prefill and decode share these functions; the default limit would give up on some.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module) is TransformerBlock:
            module.__class__ = CompiledBlock
        elif type(module) is RecurrentBlock:
            module.__class__ = CompiledLoop
