"""The reference under torch.compile, applied as a careful user would apply it.

`torch.compile(model)` cannot compile the whole model: the number of tokens per expert depends on data, and the loop
index selects cache entries and LoRA scales, so every loop would be a separate graph. The parts in between are compiled
instead: each block before and after the cache, and the update of the loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmythos import MLAttention, OpenMythos, RecurrentBlock, TransformerBlock
from openmythos.cache import layer_cache
from openmythos.recurrence import act_update

NOTE = (
    "torch.compile (default mode) on norms and attention before and after the cache, and on the update of the loop; "
    "experts and Python control flow stay eager; compile time is not included"
)


class CompiledBlock(TransformerBlock):
    """The reference's block as two graphs with the cache between them, followed by the eager experts."""

    def forward(self, x, freqs_cis, mask=None, kv_cache=None, cache_key="default"):
        q, latent, k_rope = _before_cache(self.attn_norm, self.attn, x, freqs_cis)
        entry = layer_cache(kv_cache, cache_key)
        if entry is not None:
            latent, k_rope = entry.append(latent=latent, k_rope=k_rope)
        x, y = _after_cache(self.attn, self.ffn_norm, x, q, latent, k_rope, mask)
        return x + self.ffn(y)


class CompiledLoop(RecurrentBlock):
    """The reference's loop with one graph for the update of all loops.

    The loop index is passed as a tensor. In the first loop the state is `e` itself; passing a view hides that, since
    two aliased inputs would need another graph.
    """

    def step(self, h, e, u, f, state, t, last):
        return _update(self, h.view_as(h), e, u, f + self.lora(f, t), state, torch.tensor(t, device=h.device))


@torch.compile
def _before_cache(norm: nn.Module, attn: MLAttention, x: Tensor, freqs_cis: Tensor):
    x = norm(x)
    return attn.query(x, freqs_cis), *attn.latent(x, freqs_cis)


@torch.compile
def _after_cache(attn: MLAttention, norm: nn.Module, x: Tensor, q: Tensor, latent: Tensor, k_rope: Tensor, mask):
    x = x + attn.wo(attn.attend(q, *attn.expand(latent, k_rope), mask))
    return x, norm(x)


@torch.compile
def _update(loop: RecurrentBlock, h: Tensor, e: Tensor, u: Tensor, f: Tensor, state, t: Tensor):
    new = loop.injection.update(h, e, u, f)
    state = act_update(state, new, loop.act(new), t, loop.cfg.act_threshold, False)
    # The last loop does not need this input, but computing it is cheaper than compiling a second graph for that loop.
    return new, state, loop.injection.enter(new, e, t + 1, loop.norm)


def compile_reference(model: OpenMythos) -> None:
    """Replaces parts of a reference model by compiled ones, in place. It must have MLA, LoRA, `evolve` halting and no
    dropout."""
    # Training, prefill and decode share these functions and exceed the default limit.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module) is TransformerBlock:
            module.__class__ = CompiledBlock
        elif type(module) is RecurrentBlock:
            module.__class__ = CompiledLoop
