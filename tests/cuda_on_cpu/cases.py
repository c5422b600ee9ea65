"""Small runs of the ops with CUDA kernels, on the forced backend, and comparisons of their results."""

from __future__ import annotations

import torch

from openmythos_kernels.ops.loop import compact_active, gather_rows, loop_step, scatter_rows


def step_arguments(B, T, D, rank, dtype, *, cumulative_p=(0.0, 1.0), running=0.7, bias=None, offset=0, seed=0) -> dict:
    """Arguments of `loop_step`. `offset`: how many elements past an aligned address each tensor starts."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def placed(x):
        memory = torch.empty(x.numel() + offset, dtype=x.dtype)
        return memory[offset:].view(x.shape).copy_(x)

    def new(*shape):
        return placed(torch.randn(shape, generator=generator).to(dtype))

    low, high = cumulative_p
    return dict(
        h=new(B, T, D),
        e=new(B, T, D),
        f=new(B, T, D),
        lora_hidden=new(B, T, rank),
        h_out=new(B, T, D),
        cumulative_p=torch.rand(B, T, generator=generator).to(wide) * (high - low) + low,
        running=torch.rand(B, T, generator=generator) < running,
        ponder=torch.rand(B, T, generator=generator).to(wide),
        lora_B=new(rank, D),
        log_A=new(D),
        log_dt=new(1),
        B=new(D),
        halt_weight=placed(new(1, D) / D**0.5),
        halt_bias=new(1) if bias is None else torch.full((1,), bias, dtype=dtype),
        norm_weight=new(D),
        emb=new(D // 8),
    )


def step_results(enter=True, spend_remainder=False, unused=(), **sizes) -> list:
    """Outputs of one step, and gradients of all inputs given random gradients of the outputs that are not `unused`."""
    x = step_arguments(**sizes)
    for name, value in x.items():
        value.requires_grad_(value.is_floating_point() and name != "emb")
    out = loop_step(*x.values(), loop=1, threshold=0.7, spend_remainder=spend_remainder, enter=enter, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    graded = [o for i, o in enumerate(out) if o.requires_grad and i not in unused]
    grads = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in graded]
    torch.autograd.backward(graded, grads)
    return [o.detach() for o in out] + [v.grad for v in x.values() if v.requires_grad]


def compaction_results(B, T, D, running, dtype=torch.float32, offset=0, seed=0) -> list:
    generator = torch.Generator().manual_seed(seed)
    runs = torch.rand(B, T, generator=generator) < running
    memory = torch.randn(2, B * T * D + offset, generator=generator).to(dtype)
    x, base = (row[offset:].view(B * T, D).requires_grad_(dtype.is_floating_point) for row in memory)
    active = compact_active(runs)
    rows = gather_rows(x, active.index)
    out = scatter_rows(base, rows * 2, active.index)
    if out.requires_grad:
        out.backward(memory.flatten()[: out.numel()].detach().view(out.shape))
    return [*active, rows.detach(), out.detach(), x.grad, base.grad]


def close(got: list, expected: list) -> bool:
    """Equal up to rounding: within a few epsilons, relative to the largest element."""
    for a, b in zip(got, expected, strict=True):
        if (a is None) != (b is None):
            return False
        if a is None or not a.numel():
            continue
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        ulps = 10000 if a.dtype == torch.float64 else 100  # float64 sums may cancel; 1e-12 is enough
        allowed = ulps * torch.finfo(a.dtype).eps * max(b.double().abs().max().item(), 1.0)
        if not (a.double() - b.double()).abs().max().item() <= allowed:
            return False
    return True


def equal(got: list, expected: list) -> bool:
    return all(torch.equal(a, b) if a is not None else b is None for a, b in zip(got, expected, strict=True))


# What `faulty.py` runs: just enough for each fault of test_faults.py to show.
FAULTS = {
    step_results: [
        dict(B=1, T=515, D=24, rank=2, dtype=torch.float32),
        dict(B=1, T=3, D=1000, rank=1, dtype=torch.bfloat16),
        dict(B=1, T=5, D=36, rank=1, dtype=torch.bfloat16),
    ],
    compaction_results: [dict(B=3, T=1031, D=3, running=0.6)],
}
