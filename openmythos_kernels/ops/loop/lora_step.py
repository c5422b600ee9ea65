"""The loop step with the LoRA's down-projection inside: what the block made is then read once. CPU only, since on GPUs
the library's product is as fast.

With `raw = f @ down^T` it is `loop_step` with `lora_hidden = raw * scale`; in the backward pass likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.loop.step import LoopStep, check, fake_step
from openmythos_kernels.ops.op import Op


def loop_lora_step(
    h: Tensor,
    e: Tensor,
    f: Tensor,
    down: Tensor,
    scale: Tensor,
    h_out: Tensor,
    cumulative_p: Tensor,
    running: Tensor,
    ponder: Tensor,
    lora_B: Tensor,
    log_A: Tensor,
    log_dt: Tensor,
    B: Tensor,
    halt_weight: Tensor,
    halt_bias: Tensor,
    norm_weight: Tensor,
    emb: Tensor,
    loop: int,
    threshold: float,
    spend_remainder: bool,
    enter: bool,
    eps: float,
) -> LoopStep:
    """As `openmythos_kernels.ops.loop.loop_step`, with the LoRA's own weights in place of the coordinates of f.

    Args:
        down: (rank, D). scale: (rank,), this loop's. Both in h's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    check(
        h,
        e=e,
        f=f,
        down=down,
        scale=scale,
        h_out=h_out,
        cumulative_p=cumulative_p,
        running=running,
        ponder=ponder,
        lora_B=lora_B,
        log_A=log_A,
        log_dt=log_dt,
        B=B,
        halt_weight=halt_weight,
        halt_bias=halt_bias,
        norm_weight=norm_weight,
        emb=emb,
    )
    out = LOOP_LORA_STEP(
        h.contiguous(),
        e.contiguous(),
        f.contiguous(),
        down.contiguous(),
        scale.contiguous(),
        h_out.contiguous(),
        cumulative_p.contiguous(),
        running.contiguous(),
        ponder.contiguous(),
        lora_B.contiguous(),
        log_A.contiguous(),
        log_dt,
        B.contiguous(),
        halt_weight.contiguous(),
        halt_bias,
        norm_weight.contiguous(),
        emb.contiguous(),
        loop,
        threshold,
        spend_remainder,
        enter,
        eps,
    )
    return LoopStep(*out[:6])


def _fake(h, e, f, down, scale, h_out, cumulative_p, running, ponder, *rest):
    return (
        *fake_step(h, e, f, None, h_out, cumulative_p, running, ponder, *rest),
        h.new_empty(*h.shape[:-1], len(down)),
    )


def _setup_context(ctx, inputs, output):
    (
        h,
        e,
        f,
        down,
        scale,
        _,
        cumulative_p,
        running,
        _,
        lora_B,
        log_A,
        log_dt,
        B,
        halt_weight,
        halt_bias,
        norm_weight,
        emb,
    ) = inputs[:17]
    _, ctx.threshold, ctx.spend_remainder, ctx.enter, ctx.eps = inputs[17:]
    h_next, _, _, running_next, _, _, p, rstd, raw = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(running_next, p, rstd, raw)
    ctx.save_for_backward(
        halt_bias,
        h,
        e,
        f,
        raw,
        down,
        scale,
        cumulative_p,
        running,
        h_next,
        p,
        rstd,
        lora_B,
        log_A,
        log_dt,
        B,
        halt_weight,
        norm_weight,
        emb,
    )


def _backward(ctx, grad_h, grad_h_out, grad_cumulative_p, _running, grad_ponder, grad_u, _p, _rstd, _raw):
    grad_u = grad_u if ctx.enter else None
    grads = [g if g is None else g.contiguous() for g in (grad_h, grad_h_out, grad_cumulative_p, grad_ponder, grad_u)]
    halt_bias, *saved = ctx.saved_tensors
    dh, de, df, ddown, dscale, dcumulative_p, dponder, *parameters = _gradients(
        halt_bias, ctx.eps, *grads, *saved, ctx.threshold, ctx.spend_remainder
    )
    # h_out enters as h_out' = h_out + ..., so its gradient is the one that came.
    return (
        dh,
        de,
        df,
        ddown,
        dscale,
        grad_h_out,
        dcumulative_p,
        None,
        dponder,
        *parameters,
        None,
        None,
        None,
        None,
        None,
        None,
    )


def _fake_backward(
    grad_h,
    grad_h_out,
    grad_cumulative_p,
    grad_ponder,
    grad_u,
    h,
    e,
    f,
    raw,
    down,
    scale,
    cumulative_p,
    running,
    h_next,
    p,
    rstd,
    lora_B,
    log_A,
    log_dt,
    B,
    halt_weight,
    norm_weight,
    emb,
    threshold,
    spend_remainder,
):
    like = (
        h,
        e,
        f,
        down,
        scale,
        cumulative_p,
        cumulative_p,
        lora_B,
        log_A,
        log_dt,
        B,
        halt_weight,
        log_dt,
        norm_weight,
    )
    return tuple(torch.empty_like(x) for x in like)


LOOP_LORA_STEP = Op(
    "loop_lora_step(Tensor h, Tensor e, Tensor f, Tensor down, Tensor scale, Tensor h_out, Tensor cumulative_p, Tensor running, "
    "Tensor ponder, Tensor lora_B, Tensor log_A, Tensor log_dt, Tensor B, Tensor halt_weight, Tensor halt_bias, "
    "Tensor norm_weight, Tensor emb, int loop, float threshold, bool spend_remainder, bool enter, float eps) "
    "-> (Tensor h_next, Tensor h_out_next, Tensor cumulative_p_next, Tensor running_next, Tensor ponder_next, Tensor u, "
    "Tensor p, Tensor rstd, Tensor raw)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    formula=formula.lora_step,
)

# Gradients of the outputs may be absent; a missing grad_u means that no norm follows.
LOOP_LORA_STEP_BACKWARD = Op(
    "loop_lora_step_backward(Tensor? grad_h, Tensor? grad_h_out, Tensor? grad_cumulative_p, Tensor? grad_ponder, Tensor? grad_u, "
    "Tensor h, Tensor e, Tensor f, Tensor raw, Tensor down, Tensor scale, Tensor cumulative_p, Tensor running, Tensor h_next, "
    "Tensor p, Tensor rstd, Tensor lora_B, Tensor log_A, Tensor log_dt, Tensor B, Tensor halt_weight, Tensor norm_weight, "
    "Tensor emb, float threshold, bool spend_remainder) "
    "-> (Tensor h, Tensor e, Tensor f, Tensor down, Tensor scale, Tensor cumulative_p, Tensor ponder, Tensor lora_B, Tensor log_A, "
    "Tensor log_dt, Tensor B, Tensor halt_weight, Tensor halt_bias, Tensor norm_weight)",
    fake=_fake_backward,
)
_gradients = Again(lambda halt_bias, eps, *args: LOOP_LORA_STEP_BACKWARD(*args), formula.lora_step_backward)
