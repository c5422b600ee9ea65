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
from openmythos_kernels.ops.mla.kernels.attention_once import attention_delta_kernel, attention_once_kernel
from openmythos_kernels.ops.mla.launch.walk import walkable
from openmythos_kernels.runtime import unproven


def forward(q_nope, q_rope, kv, k_rope, start, key_lengths):
    """`openmythos::mla_attention`."""
    B, T, H, nope = q_nope.shape
    out = q_nope.new_empty(B, T, H, kv.shape[-1] - nope)
    lse = q_nope.new_empty((B, H, T), dtype=torch.float32)
    return _forward((q_nope, q_rope, kv, k_rope), (start, key_lengths), out, lse)


def forward_rows(q_nope, q_rope, kv, k_rope, position, offset):
    """`openmythos::mla_attention_rows`."""
    N, H, nope = q_nope.shape
    out = q_nope.new_empty(N, H, kv.shape[-1] - nope)
    lse = q_nope.new_empty((H, N), dtype=torch.float32)
    return _forward((q_nope, q_rope, kv, k_rope), (position, offset), out, lse)


def backward(grad_out, q_nope, q_rope, kv, k_rope, start, key_lengths, out, lse):
    """`openmythos::mla_attention_backward`."""
    made = grad_out.new_empty(0)
    if out is None:
        made = out = forward(q_nope, q_rope, kv, k_rope, start, key_lengths)[0]
    return *backward_rows(grad_out, q_nope, q_rope, kv, k_rope, start, key_lengths, out, lse), made


def backward_rows(grad_out, q_nope, q_rope, kv, k_rope, places, limits, out, lse):
    """`openmythos::mla_attention_rows_backward`; of consecutive queries as well."""
    dq_nope, dq_rope, dkv, dk_rope = found = tuple(x.new_empty(x.shape) for x in (q_nope, q_rope, kv, k_rope))
    if not lse.numel():
        return dq_nope, dq_rope, dkv.zero_(), dk_rope.zero_()
    if not kv.numel():
        return dq_nope.zero_(), dq_rope.zero_(), dkv, dk_rope
    tensors, numbers, form = _walk(q_nope, q_rope, kv, k_rope)
    grad_out, out = grad_out.contiguous(), out.contiguous()
    parts = dk_rope.new_empty((form.H, *dk_rope.shape), dtype=torch.float32)
    once = configs.attention_once(kv.element_size(), *form.sizes) if unproven.allowed() else None  # type: ignore[call-arg]
    arguments = tensors, (places, limits), numbers, form, out, lse, grad_out, (dq_nope, dq_rope, dkv, parts)
    if once:
        _backward_once(once, *arguments)
    else:
        _backward_twice(*arguments)
    sum_groups_kernel[(triton.cdiv(dk_rope.numel(), 1024),)](parts, dk_rope, dk_rope.numel(), form.H, BLOCK=1024)
    return found


def _backward_twice(tensors, places, numbers, form, out, lse, grad_out, found):
    """Scores are computed for the queries and again for the keys."""
    dq_nope, dq_rope, dkv, parts = found
    S, itemsize = dkv.shape[1], dkv.element_size()
    delta = torch.empty_like(lse)

    config = configs.attention("dq", itemsize, *form.sizes, form.packed)  # type: ignore[call-arg]
    attention_dq_kernel[(form.sequences * form.H * triton.cdiv(form.rows, config.block_m),)](
        *tensors, *places, out, lse, grad_out, dq_nope, dq_rope, delta, *numbers, **form.constants(config)
    )

    config = configs.attention("dkv", itemsize, *form.sizes, form.packed)  # type: ignore[call-arg]
    constants = {**form.constants(config), "ROPE_BLOCK": configs.dkv_rope_block(*form.sizes)}
    attention_dkv_kernel[(form.sequences * triton.cdiv(S, config.block_n), form.H)](
        *tensors, *places, lse, grad_out, delta, dkv, parts, *numbers, **constants
    )


def _backward_once(config, tensors, places, numbers, form, out, lse, grad_out, found):
    """The owners of keys also add to the queries' gradients, in turns."""
    dkv = found[2]
    rows, T = grad_out.numel() // (form.H * form.sizes[2]), grad_out.shape[-3]
    delta = torch.empty_like(lse)
    attention_delta_kernel[(triton.cdiv(rows, configs.DELTA_ROWS), form.H)](
        grad_out,
        out,
        delta,
        rows,
        T,
        H=form.H,
        V=form.sizes[2],
        V_BLOCK=configs.power(form.sizes[2]),
        ROWS=configs.DELTA_ROWS,
        num_warps=4,
    )
    heads, constants = form.sequences * form.H, form.constants(config)
    tiles = heads * triton.cdiv(form.rows, config.block_m)
    sums = lse.new_empty(tiles * config.block_m * (constants["NOPE_BLOCK"] + constants["ROPE_BLOCK"]))
    turns = lse.new_zeros(1 + tiles, dtype=torch.int32)
    attention_once_kernel[(heads * triton.cdiv(dkv.shape[1], config.block_n),)](
        *tensors, *places, lse, grad_out, delta, *found, sums, turns, *numbers, **constants
    )


def _forward(tensors, places, out, lse):
    if not lse.numel():
        return out, lse
    tensors, numbers, form = _walk(*tensors)
    config = configs.attention("forward", out.element_size(), *form.sizes, form.packed)  # type: ignore[call-arg]
    attention_kernel[(form.sequences * form.H * triton.cdiv(form.rows, config.block_m),)](
        *tensors, *places, out, lse, *numbers, **form.constants(config)
    )
    return out, lse


class _Form:
    """What the kernels are compiled for, and how many programs they take.

    Attributes:
        sequences: their number. rows: the most queries of one.
        H, sizes: the number and widths of heads. packed: the form of the queries.
    """

    def __init__(self, q_nope: Tensor, q_rope: Tensor, kv: Tensor):
        *shape, self.H, nope = q_nope.shape
        self.packed = len(shape) == 1
        self.sequences = kv.shape[0]
        self.rows = min(shape[0], kv.shape[1]) if self.packed else shape[1]  # no two rows are at one place
        self.sizes = (nope, q_rope.shape[-1], kv.shape[-1] - nope)

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
            PACKED=self.packed,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def _walk(q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor):
    """The tensors in a form that kernels can walk, their lengths and strides, and their form."""
    form = _Form(q_nope, q_rope, kv)
    if form.packed:
        q_nope, q_rope = q_nope[None], q_rope[None]
    q_nope, q_rope, kv, k_rope = (walkable(x) for x in (q_nope, q_rope, kv, k_rope))
    rows = [x.stride(0) // x.stride(1) for x in (q_nope, q_rope, kv, k_rope)]
    steps = [*q_nope.stride()[1:3], *q_rope.stride()[1:3], *kv.stride()[1:3], k_rope.stride(1)]
    nope, rope, _ = form.sizes
    scale = (nope + rope) ** -0.5 * math.log2(math.e)
    return (q_nope, q_rope, kv, k_rope), (form.rows, kv.shape[1], *rows, *steps, scale), form
