"""The differentiable ops by the functions of `openmythos`, with the ops' arguments and results."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from openmythos.attention import attend
from openmythos.layers import RMSNorm, apply_rope
from openmythos_kernels.ops.derivatives import gradients_of


def projection(x: Tensor, weight: Tensor) -> Tensor:
    """`mla_linear`."""
    return linear(x, weight)


def projection_backward(grad, x, weight, need_x, need_weight):
    """`mla_linear_backward`."""
    dx, dweight = gradients_of(lambda *args: (linear(*args),), (x, weight), (grad,))
    return dx if need_x else x.new_empty(0), dweight if need_weight else weight.new_empty(0)


def norm_rope(x: Tensor, freqs: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`mla_norm_rope`."""
    r, rope = weight.shape[0], 2 * freqs.shape[-2]
    norm: Any = SimpleNamespace(eps=eps, weight=weight)
    normed = RMSNorm.forward(norm, x[..., :r]) if r else x[..., :0]
    turned = apply_rope(x[..., r:].unflatten(-1, (-1, rope)), torch.view_as_complex(freqs)) if x.shape[-1] > r else None
    return normed, x[..., r:] if turned is None else turned.flatten(2)


def norm_rope_backward(grad_normed, grad_rotated, x, freqs, weight, eps):
    """`mla_norm_rope_backward`."""
    return tuple(
        gradients_of(lambda x, weight: norm_rope(x, freqs, weight, eps), (x, weight), (grad_normed, grad_rotated))
    )


def attention(q_nope, q_rope, kv, k_rope, start, key_lengths) -> tuple[Tensor, Tensor]:
    """`mla_attention`."""
    out = attention_output(q_nope, q_rope, kv, k_rope, start, key_lengths)
    with torch.no_grad():
        nope = q_nope.shape[-1]
        score = torch.einsum("bthd,bshd->bhts", q_nope, kv[..., :nope]) + torch.einsum("bthd,bsd->bhts", q_rope, k_rope)
        hidden = ~_seen(q_nope, kv, start, key_lengths).unsqueeze(1)
        score = (score.float() * (nope + q_rope.shape[-1]) ** -0.5).masked_fill(hidden, float("-inf"))
        return out, score.logsumexp(-1) / math.log(2)


def attention_output(q_nope, q_rope, kv, k_rope, start, key_lengths) -> Tensor:
    """The first result of `mla_attention`. Queries that see nothing give 0, where a softmax gives NaN."""
    H, nope = q_nope.shape[2:]
    seen = _seen(q_nope, kv, start, key_lengths)
    blind = ~seen.any(-1)
    held = _held(kv, key_lengths)
    kv = torch.where(held[:, :, None, None], kv, torch.zeros_like(kv))
    k_rope = torch.where(held[:, :, None], k_rope, torch.zeros_like(k_rope))
    k = torch.cat((kv[..., :nope], k_rope.unsqueeze(2).expand(-1, -1, H, -1)), -1)
    mask = torch.zeros(seen.shape, dtype=kv.dtype, device=kv.device)
    mask = mask.masked_fill(~(seen | blind[..., None]), float("-inf")).unsqueeze(1)
    out = attend(torch.cat((q_nope, q_rope), -1), k, kv[..., nope:], mask, lambda w: w).unflatten(-1, (H, -1))
    return torch.where(blind[:, :, None, None], torch.zeros_like(out), out)


def attention_backward(grad_out, q_nope, q_rope, kv, k_rope, start, key_lengths, out, lse):
    """The first four results of `mla_attention_backward`."""

    def output(q_nope, q_rope, kv, k_rope):
        return (attention_output(q_nope, q_rope, kv, k_rope, start, key_lengths),)

    return tuple(gradients_of(output, (q_nope, q_rope, kv, k_rope), (grad_out,)))


def attention_rows(q_nope, q_rope, kv, k_rope, position, offset) -> tuple[Tensor, Tensor]:
    """`mla_attention_rows`: every row as a sequence with one query, over a copy of its sequence's keys."""
    inputs = _rows_apart(q_nope, q_rope, kv, k_rope, position, offset)
    out, lse = attention(*inputs)
    return out[:, 0], lse[:, :, 0].T


def attention_rows_output(q_nope, q_rope, kv, k_rope, position, offset) -> Tensor:
    """The first result of `mla_attention_rows`."""
    return attention_output(*_rows_apart(q_nope, q_rope, kv, k_rope, position, offset))[:, 0]


def attention_rows_backward(grad_out, q_nope, q_rope, kv, k_rope, position, offset, out, lse):
    """`mla_attention_rows_backward`."""

    def output(q_nope, q_rope, kv, k_rope):
        return (attention_rows_output(q_nope, q_rope, kv, k_rope, position, offset),)

    return tuple(gradients_of(output, (q_nope, q_rope, kv, k_rope), (grad_out,)))


def _rows_apart(q_nope, q_rope, kv, k_rope, position, offset) -> tuple[Tensor, ...]:
    """The arguments of `attention` for N sequences with a query each."""
    row = torch.arange(len(position), device=position.device)
    sequence = torch.searchsorted(offset, row, right=True) - 1
    return q_nope[:, None], q_rope[:, None], kv[sequence], k_rope[sequence], position, position + 1


def _held(kv: Tensor, key_lengths: Tensor) -> Tensor:
    """(B, S) bool: the keys that a row holds."""
    return torch.arange(kv.shape[1], device=kv.device) < key_lengths[:, None]


def _seen(q: Tensor, kv: Tensor, start: Tensor, key_lengths: Tensor) -> Tensor:
    """(B, T, S) bool: the keys that a query sees."""
    query, key = (torch.arange(n, device=kv.device) for n in (q.shape[1], kv.shape[1]))
    last = start.clamp(max=kv.shape[1])[:, None, None] + query[:, None]  # clamped, the sum does not overflow
    return _held(kv, key_lengths)[:, None] & (key <= last)
