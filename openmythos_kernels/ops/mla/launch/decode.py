"""A whole layer at one token per row: the library's matrix products around the kernels of the absorbed form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from openmythos_kernels.ops.mla.launch import latent, norm_rope


def decode(
    x,
    freqs,
    latent_cache,
    rope_cache,
    lengths,
    q_down,
    q_norm,
    q_up_nope,
    q_up_rope,
    kv_down,
    kv_norm,
    kv_up,
    wo,
    n_heads,
    nope,
    rope,
    v,
    eps,
):
    """`openmythos::mla_decode`."""
    rows, r = len(x), kv_norm.shape[0]
    freqs = freqs.unsqueeze(1)
    latent.append(F.linear(x, kv_down).unsqueeze(1), freqs, kv_norm, latent_cache, rope_cache, lengths, None, eps)
    c_q, _ = norm_rope.forward(F.linear(x, q_down).unsqueeze(1), freqs, q_norm, eps)
    c_q = c_q.squeeze(1)
    nothing = q_norm[:0]
    _, q_rope = norm_rope.forward(F.linear(c_q, q_up_rope).unsqueeze(1), freqs, nothing, eps)
    q_nope = F.linear(c_q, q_up_nope).view(rows, n_heads, nope)

    up = kv_up.view(n_heads, nope + v, r)
    q_latent = torch.bmm(q_nope.transpose(0, 1), up[:, :nope]).transpose(0, 1).contiguous()
    mean = latent.attend(
        q_latent, q_rope.view(rows, n_heads, rope), latent_cache, rope_cache, lengths + 1, None, (nope + rope) ** -0.5
    )
    out = torch.bmm(mean.transpose(0, 1), up[:, nope:].transpose(1, 2))
    return F.linear(out.transpose(0, 1).reshape(rows, n_heads * v), wo)
