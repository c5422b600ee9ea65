"""Arguments of the loop step, and calls of it."""

from __future__ import annotations

import torch

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
