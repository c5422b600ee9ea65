"""Launches of per-head latent attention, forward and backward."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from openmythos_kernels.ops.mla import configs
from openmythos_kernels.ops.mla.kernels.attention import attention_kernel
from openmythos_kernels.ops.mla.kernels.attention_backward import (
    attention_dkv_kernel,
    attention_dq_kernel,
    sum_groups_kernel,
)
from openmythos_kernels.ops.mla.launch.walk import walkable


def forward(q_nope, q_rope, kv, k_rope, start, key_lengths):
    """`openmythos::mla_attention`."""
    B, T, H, nope = q_nope.shape
    v = kv.shape[-1] - nope
    out = q_nope.new_empty(B, T, H, v)
    lse = q_nope.new_empty((B, H, T), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    tensors, numbers, widths = _walk(q_nope, q_rope, kv, k_rope)
    config = configs.attention("forward", q_nope.element_size(), *widths.sizes)
    attention_kernel[(B * H * triton.cdiv(T, config.block_m),)](
        *tensors, start, key_lengths, out, lse, *numbers, **widths.constants(config)
    )
    return out, lse


def backward(grad_out, q_nope, q_rope, kv, k_rope, start, key_lengths, out, lse):
    """`openmythos::mla_attention_backward`."""
    B, T, H, _ = q_nope.shape
    S = kv.shape[1]
    dq_nope, dq_rope, dkv, dk_rope = (x.new_empty(x.shape) for x in (q_nope, q_rope, kv, k_rope))
    made = grad_out.new_empty(0)
    if out is None:
        made = out = forward(q_nope, q_rope, kv, k_rope, start, key_lengths)[0]
    if not lse.numel():
        return dq_nope, dq_rope, dkv.zero_(), dk_rope.zero_(), made
    if not kv.numel():
        return dq_nope.zero_(), dq_rope.zero_(), dkv, dk_rope, made
    tensors, numbers, widths = _walk(q_nope, q_rope, kv, k_rope)
    grad_out, out = grad_out.contiguous(), out.contiguous()
    delta = torch.empty_like(lse)

    config = configs.attention("dq", q_nope.element_size(), *widths.sizes)
    attention_dq_kernel[(B * H * triton.cdiv(T, config.block_m),)](
        *tensors, start, key_lengths, out, lse, grad_out, dq_nope, dq_rope, delta, *numbers, **widths.constants(config)
    )

    config = configs.attention("dkv", q_nope.element_size(), *widths.sizes)
    parts = dk_rope.new_empty((H, *dk_rope.shape), dtype=torch.float32)
    constants = {**widths.constants(config), "ROPE_BLOCK": configs.dkv_rope_block(*widths.sizes)}
    attention_dkv_kernel[(B * triton.cdiv(S, config.block_n), H)](
        *tensors, start, key_lengths, lse, grad_out, delta, dkv, parts, *numbers, **constants
    )
    sum_groups_kernel[(triton.cdiv(dk_rope.numel(), 1024),)](parts, dk_rope, dk_rope.numel(), H, BLOCK=1024)
    return dq_nope, dq_rope, dkv, dk_rope, made


class _Widths:
    """The number and widths of heads, which the kernels are compiled for."""

    def __init__(self, H: int, nope: int, rope: int, v: int):
        self.H, self.sizes = H, (nope, rope, v)

    def constants(self, config: configs.Config) -> dict:
        nope, rope, v = self.sizes
        return dict(
            H=self.H,
            NOPE=nope,
            ROPE=rope,
            V=v,
            NOPE_BLOCK=configs.power(nope),
            ROPE_BLOCK=configs.power(rope),
            V_BLOCK=configs.power(v),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _walk(q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor):
    """The tensors in a form that kernels can walk, their lengths and strides, and their widths."""
    q_nope, q_rope, kv, k_rope = (walkable(x) for x in (q_nope, q_rope, kv, k_rope))
    nope, rope = q_nope.shape[-1], q_rope.shape[-1]
    rows = [x.stride(0) // x.stride(1) for x in (q_nope, q_rope, kv, k_rope)]
    steps = [*q_nope.stride()[1:3], *q_rope.stride()[1:3], *kv.stride()[1:3], k_rope.stride(1)]
    scale = (nope + rope) ** -0.5 * math.log2(math.e)
    numbers = (q_nope.shape[1], kv.shape[1], *rows, *steps, scale)
    return (q_nope, q_rope, kv, k_rope), numbers, _Widths(q_nope.shape[2], nope, rope, kv.shape[-1] - nope)
