"""Latent-attention layers with caches, and arguments of `mla_decode`."""

from __future__ import annotations

import copy

import torch
from torch import nn

import openmythos
from openmythos.attention import CausalMask
from openmythos.cache import LayerCache
from openmythos.layers import rotary_table

NAMES = ("q_down", "q_norm", "q_up_nope", "q_up_rope", "kv_down", "kv_norm", "kv_up", "wo")
# dim, n_heads, kv_lora_rank, q_lora_rank, nope, rope, v
PLAIN = (32, 8, 32, 24, 16, 8, 16)
SIZES = {
    "plain": PLAIN,
    "one head": (20, 1, 24, 8, 4, 2, 8),
    "odd": (33, 3, 21, 11, 5, 6, 7),
    "two vectors of heads": (24, 17, 40, 9, 3, 2, 5),
    "five heads, width one": (16, 5, 1, 1, 1, 2, 1),
}


def reference(sizes, dtype=torch.float32, dropout=0.0, seed=0):
    """A reference layer whose weights have a gain above 1, so that the softmax is far from uniform."""
    torch.manual_seed(seed)
    dim, heads, r, q_rank, nope, rope, v = sizes
    cfg = openmythos.MythosConfig(
        dim=dim * heads,
        n_heads=heads,
        n_kv_heads=heads,
        kv_lora_rank=r,
        q_lora_rank=q_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
        attn_type="mla",
        dropout=dropout,
    )
    module = openmythos.MLAttention(cfg)
    for p in module.parameters():
        nn.init.normal_(p, 1.0, 0.2) if p.dim() == 1 else nn.init.normal_(p, std=1.5 * p.shape[1] ** -0.5)
    return module.to(dtype).eval()


def filled_cache(module, lengths, capacity, seed=1):
    """A cache whose rows hold `lengths` tokens, followed by NaN."""
    torch.manual_seed(seed)
    entry = LayerCache()
    dtype = module.wo.weight.dtype
    for name, width in (("latent", module.kv_lora_rank), ("k_rope", module.qk_rope_dim)):
        held = torch.randn(len(lengths), capacity, width).to(dtype)
        for b, n in enumerate(lengths):
            held[b, n:] = float("nan")
        entry.tensors[name] = held
    entry.lengths = list(lengths)
    return {"default": entry}


def token(module, lengths, seed=2):
    """x, freqs_cis and mask for one new token per row."""
    torch.manual_seed(seed)
    table = rotary_table(module.qk_rope_dim, max(lengths) + 1, 100.0)
    x = torch.randn(len(lengths), 1, module.wo.out_features).to(module.wo.weight.dtype)
    return x, table[torch.tensor(lengths)].unsqueeze(1), CausalMask(list(lengths), 1)


def widened(cache):
    """The cache in float64, with zeros for NaN, since the reference multiplies hidden values by 0."""
    out = copy.deepcopy(cache)
    for entry in out.values():
        entry.tensors = {name: t.double().nan_to_num() for name, t in entry.tensors.items()}
    return out


def op_args(module, cache, x, freqs_cis):
    """The arguments of `mla_decode`, in order."""
    entry = cache["default"]
    return (
        x.squeeze(1),
        torch.view_as_real(freqs_cis).flatten(0, 1),
        *entry.tensors.values(),
        torch.tensor(entry.lengths),
        *(getattr(module, name).weight.detach() for name in NAMES),
        module.n_heads,
        module.qk_nope_dim,
        module.qk_rope_dim,
        module.v_dim,
        module.q_norm.eps,
    )


def named_args(module, cache, x, freqs_cis):
    """The positional and the named arguments of the public function."""
    args = op_args(module, cache, x, freqs_cis)
    return args[:5], dict(zip((*NAMES, "n_heads", "nope", "rope", "v", "eps"), args[5:]))
