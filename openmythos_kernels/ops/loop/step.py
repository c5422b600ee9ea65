"""One loop of a recurrent block after its transformer block, as one pass over the hidden states.

With `p = sigmoid(halt_weight . h' + halt_bias)` and `left = 1 - cumulative_p`:

    A      = exp(-exp(clamp(log_dt + log_A, -16.6, 20)))
    h'     = A * h + B * e + f + lora_hidden @ lora_B
    w      = 0 where not running; left clamped at 0 where cumulative_p + p >= threshold or spend_remainder; else p
    h_out' = h_out + w * h'
    u      = RMSNorm(h' + emb + e)                      what the block reads in the next loop

What it computes is defined by `openmythos.recurrence.RecurrentBlock.step`; sums
are float32 (float64 for float64 tensors), and h' counts as rounded to its dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.op import Op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LoopStep(NamedTuple):
    """Results of `loop_step`, shaped like the inputs of the same name."""

    h: Tensor
    h_out: Tensor
    cumulative_p: Tensor
    running: Tensor
    ponder: Tensor
    u: Tensor  # empty without `enter`


def loop_step(
    h: Tensor,
    e: Tensor,
    f: Tensor,
    lora_hidden: Tensor,
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
    """One loop of a recurrent block, but for the transformer block itself.

    Args:
        h, e, f, h_out: state, injected input, block output, weighted sum of states so far; (..., D) in one of DTYPES.
        low: (..., rank) in h's dtype, the scaled low-rank coordinates of f; rank may be 0.
        cumulative_p, ponder: (...) float32 (float64 for float64 h): halting probability used up, ponder cost.
        running: (...) bool, positions that have not halted.
        lora_B: (rank, D). log_A, B, norm_weight: (D,). log_dt, halt_bias: (1,). halt_weight: (1, D). All in h's dtype.
        emb: embedding of the next loop's number, added to the first len(emb) <= D channels.
        loop: this loop's number, from 0.
        threshold: a position halts once `cumulative_p` reaches it.
        spend_remainder: whether every running position spends all that is left.
        enter: whether to make u, the next loop's input.
        eps: of the RMSNorm.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    check(
        h,
        e=e,
        f=f,
        lora_hidden=lora_hidden,
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
    out = LOOP_STEP(
        h.contiguous(),
        e.contiguous(),
        f.contiguous(),
        lora_hidden.contiguous(),
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


def check(h: Tensor, **args: Tensor) -> None:
    """That the step's arguments, by name, go with h. ValueError names the one that does not."""
    if h.dtype not in DTYPES or h.dim() < 1:
        raise ValueError(f"h: got {h.dtype} of shape {tuple(h.shape)}, expected (..., D) in one of {DTYPES}")
    positions, D = h.shape[:-1], h.shape[-1]
    rank = args["lora_B"].shape[0]
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    for dtype, shape, names in (
        (h.dtype, h.shape, ("e", "f", "h_out")),
        (h.dtype, (*positions, rank), ("lora_hidden",)),
        (h.dtype, (rank,), ("scale",)),
        (wide, positions, ("cumulative_p", "ponder")),
        (torch.bool, positions, ("running",)),
        (h.dtype, (rank, D), ("lora_B", "down")),
        (h.dtype, (D,), ("log_A", "B", "norm_weight")),
        (h.dtype, (1,), ("log_dt", "halt_bias")),
        (h.dtype, (1, D), ("halt_weight",)),
    ):
        for name in names:
            if name not in args:
                continue  # there is lora_hidden, or scale and down
            x = args[name]
            if x.dtype != dtype or x.shape != shape or x.device != h.device:
                raise ValueError(
                    f"{name}: got {x.dtype} of shape {tuple(x.shape)} on {x.device}, "
                    f"expected {dtype} of shape {tuple(shape)} on {h.device}"
                )
    emb = args["emb"]
    if emb.dtype != h.dtype or emb.dim() != 1 or emb.shape[0] > D or emb.device != h.device:
        raise ValueError(
            f"emb: got {emb.dtype} of shape {tuple(emb.shape)} on {emb.device}, "
            f"expected {h.dtype} of shape (n,), n <= {D}, on {h.device}"
        )


def fake_step(
    h,
    e,
    f,
    lora_hidden,
    h_out,
    cumulative_p,
    running,
    ponder,
    lora_B,
    log_A,
    log_dt,
    B,
    halt_weight,
    halt_bias,
    norm_weight,
    emb,
    loop,
    threshold,
    spend_remainder,
    enter,
    eps,
):
    return (
        torch.empty_like(h),
        torch.empty_like(h),
        torch.empty_like(cumulative_p),
        torch.empty_like(running),
        torch.empty_like(ponder),
        h.new_empty(h.shape if enter else (0,)),
        torch.empty_like(cumulative_p),
        cumulative_p.new_empty(cumulative_p.shape if enter else (0,)),
    )


def _setup_context(ctx, inputs, output):
    h, e, f, lora_hidden, h_out, cumulative_p, running, ponder, lora_B, log_A, log_dt, B, halt_weight, halt_bias = (
        inputs[:14]
    )
    norm_weight, emb, _, ctx.threshold, ctx.spend_remainder, ctx.enter, ctx.eps = inputs[14:]
    h_next, _, _, running_next, _, _, p, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(running_next, p, rstd)
    ctx.save_for_backward(
        halt_bias,
        h,
        e,
        lora_hidden,
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


def _backward(ctx, grad_h, grad_h_out, grad_cumulative_p, _running, grad_ponder, grad_u, _p, _rstd):
    grad_u = grad_u if ctx.enter else None
    grads = [g if g is None else g.contiguous() for g in (grad_h, grad_h_out, grad_cumulative_p, grad_ponder, grad_u)]
    halt_bias, *saved = ctx.saved_tensors
    dh, de, df, dlora_hidden, dcumulative_p, dponder, *parameters = _gradients(
        halt_bias, ctx.eps, *grads, *saved, ctx.threshold, ctx.spend_remainder
    )
    # h_out enters as h_out' = h_out + ..., so its gradient is the one that came.
    return (
        dh,
        de,
        df,
        dlora_hidden,
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
    lora_hidden,
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
        h,
        lora_hidden,
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


LOOP_STEP = Op(
    "loop_step(Tensor h, Tensor e, Tensor f, Tensor lora_hidden, Tensor h_out, Tensor cumulative_p, Tensor running, Tensor ponder, "
    "Tensor lora_B, Tensor log_A, Tensor log_dt, Tensor B, Tensor halt_weight, Tensor halt_bias, Tensor norm_weight, "
    "Tensor emb, int loop, float threshold, bool spend_remainder, bool enter, float eps) "
    "-> (Tensor h_next, Tensor h_out_next, Tensor cumulative_p_next, Tensor running_next, Tensor ponder_next, Tensor u, "
    "Tensor p, Tensor rstd)",
    fake=fake_step,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.loop.launch.step:loop_step",
    formula=formula.step,
)

# Gradients of the outputs may be absent; a missing grad_u means that no norm follows.
LOOP_STEP_BACKWARD = Op(
    "loop_step_backward(Tensor? grad_h, Tensor? grad_h_out, Tensor? grad_cumulative_p, Tensor? grad_ponder, Tensor? grad_u, "
    "Tensor h, Tensor e, Tensor lora_hidden, Tensor cumulative_p, Tensor running, Tensor h_next, Tensor p, Tensor rstd, "
    "Tensor lora_B, Tensor log_A, Tensor log_dt, Tensor B, Tensor halt_weight, Tensor norm_weight, Tensor emb, "
    "float threshold, bool spend_remainder) "
    "-> (Tensor h, Tensor e, Tensor f, Tensor lora_hidden, Tensor cumulative_p, Tensor ponder, Tensor lora_B, Tensor log_A, "
    "Tensor log_dt, Tensor B, Tensor halt_weight, Tensor halt_bias, Tensor norm_weight)",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.loop.launch.step:loop_step_backward",
)
_gradients = Again(lambda halt_bias, eps, *args: LOOP_STEP_BACKWARD(*args), formula.step_backward)
