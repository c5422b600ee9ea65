"""Recurrent blocks, arguments of the loop step, and calls of both."""

from __future__ import annotations

import torch

import openmythos
from openmythos.layers import rotary_table
from openmythos_kernels.ops.loop import loop_step


def op_arguments(B, T, dim, rank, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape):
        return torch.randn(shape).to(dtype)

    return dict(
        h=new(B, T, dim),
        e=new(B, T, dim),
        f=new(B, T, dim),
        lora_hidden=new(B, T, rank),
        h_out=new(B, T, dim),
        cumulative_p=torch.rand(B, T, dtype=wide),
        running=torch.rand(B, T) < 0.7,
        ponder=torch.rand(B, T, dtype=wide),
        lora_B=new(rank, dim),
        log_A=new(dim),
        log_dt=new(1),
        B=new(dim),
        halt_weight=new(1, dim) / dim**0.5,
        halt_bias=new(1),
        norm_weight=new(dim),
        emb=new(dim // 8),
    )


SCALARS = dict(loop=1, threshold=0.7, spend_remainder=False, enter=True, eps=1e-6)


def call(arguments, function=loop_step, **scalars):
    return function(*arguments.values(), *(SCALARS | scalars).values())


def with_gradients(arguments, function, **scalars):
    x = {k: v.detach().clone().requires_grad_(v.is_floating_point() and k != "emb") for k, v in arguments.items()}
    out = call(x, function, **scalars)
    torch.manual_seed(1)
    graded = [o for o in out[:6] if o.requires_grad]
    torch.autograd.backward(graded, [torch.randn(o.shape).to(o.dtype) for o in graded])
    return [o.detach() for o in out[:6]], [v.grad for v in x.values() if v.requires_grad]


def small_block(std, **fields):
    """A reference RecurrentBlock with a dense core and weights drawn with `std`."""
    defaults = dict(
        vocab_size=8,
        dim=24,
        n_heads=2,
        n_kv_heads=1,
        max_seq_len=16,
        max_loop_iters=6,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        lora_rank=4,
        n_experts=4,
        expert_dim=8,
        core_ffn="dense",
        ffn_dim=16,
    )
    block = openmythos.RecurrentBlock(openmythos.MythosConfig(**{**defaults, **fields}))
    for p in block.parameters():
        torch.nn.init.normal_(p, std=std)
    return block


def run_block(block, x, n_loops, mask=None, freqs=None, **options):
    """Output, ponder cost and every gradient of a block whose initial state and input are `x`."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    if freqs is None:
        freqs = rotary_table(4, x.shape[1], 10000.0).to(torch.promote_types(x.dtype, torch.complex64))
    act = block.cfg.halting != "off"
    out = block(x, x, freqs, mask, n_loops, None, act, **options)
    out, ponder = out if act else (out, x.new_zeros(()))
    torch.manual_seed(1)
    (out * torch.randn_like(out)).sum().backward(retain_graph=act)
    if ponder.requires_grad:  # False if every position halts in the first loop that has gradients
        ponder.square().sum().backward()
    found = {"out": out.detach(), "ponder": ponder.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in block.named_parameters()}
