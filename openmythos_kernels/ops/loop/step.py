"""One loop of a recurrent block after its transformer block, as one pass over the hidden states.

With `p = sigmoid(halt_weight . h' + halt_bias)` and `left = 1 - cumulative_p`:

    A      = exp(-exp(clamp(log_dt + log_A, -16.6, 20)))
    h'     = A * h + B * e + f + lora_hidden @ lora_B
    w      = 0 where not running; left clamped at 0 where cumulative_p + p >= threshold or spend_remainder; else p
    h_out' = h_out + w * h'
    u      = RMSNorm(h' + emb + e)                      what the block reads in the next loop

`openmythos.recurrence.RecurrentBlock.step` defines the results. Sums are float32 (float64 for float64 tensors), and
everything that reads h' reads it rounded to its dtype.

`loop_lora_step` is the same step with other LoRA tensors. Both ops share their schemas and most of their code, with
the arguments in five groups: the hidden states (h, e, f), the LoRA's, ACT's state, the weights, and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.op import Op

STATE = ("h_out", "cumulative_p", "running", "ponder")
WEIGHTS = ("lora_B", "log_A", "log_dt", "B", "halt_weight", "halt_bias", "norm_weight", "emb")


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
        h, e, f, h_out: state, injected input, block output, weighted sum of states so far; (..., D) in one of FLOATS.
        lora_hidden: (..., rank) in h's dtype, the scaled low-rank coordinates of f; rank may be 0.
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
    state = (h_out, cumulative_p, running, ponder)
    weights = (lora_B, log_A, log_dt, B, halt_weight, halt_bias, norm_weight, emb)
    numbers = (loop, threshold, spend_remainder, enter, eps)
    return run(LOOP_STEP, (h, e, f), {"lora_hidden": lora_hidden}, state, weights, numbers)


def run(
    op: Op,
    hidden: Sequence[Tensor],
    lora: dict[str, Tensor],
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    numbers: Sequence[Any],
) -> LoopStep:
    """Checks the tensors and calls the op with them, contiguous.

    Raises:
        ValueError: a tensor's shape, dtype or device does not fit h; names it.
    """
    h, e, f = hidden
    _check(h, {"e": e, "f": f, **lora, **dict(zip(STATE, state)), **dict(zip(WEIGHTS, weights))})
    tensors = [x.contiguous() for x in (*hidden, *lora.values(), *state, *weights)]
    return LoopStep(*op(*tensors, *numbers)[:6])


def _check(h: Tensor, args: dict[str, Tensor]) -> None:
    if h.dtype not in FLOATS or h.dim() < 1:
        raise ValueError(f"h: got {h.dtype} of shape {tuple(h.shape)}, expected (..., D) in one of {FLOATS}")
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
                continue  # lora_hidden in one op, down and scale in the other
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


def fake_step(h, e, f, lora_hidden, h_out, cumulative_p, running, ponder, *rest):
    """Shapes of the step's results; rest: weights and numbers."""
    enter = rest[-2]
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


def save(ctx, inputs, output, lora: Sequence[Tensor]) -> None:
    """`setup_context` of both ops; lora: what the backward reads of the LoRA, in its schema's order."""
    h, e = inputs[:2]
    _, cumulative_p, running, _, *weights, halt_bias, norm_weight, emb = inputs[-17:-5]
    _, ctx.threshold, ctx.spend_remainder, ctx.enter, ctx.eps = inputs[-5:]
    h_next, _, _, running_next, _, _, *kept = output
    p, rstd = kept[:2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(running_next, *kept)
    ctx.save_for_backward(halt_bias, h, e, *lora, cumulative_p, running, h_next, p, rstd, *weights, norm_weight, emb)


def backward_of(gradients: Callable[..., Sequence[Tensor]], ctx, grads: Sequence[Tensor | None]) -> tuple:
    """`backward` of both ops; gradients: the backward op, behind `halt_bias` and `eps` for its formula."""
    grad_h, grad_h_out, grad_cumulative_p, _, grad_ponder, grad_u = grads[:6]
    grads = (grad_h, grad_h_out, grad_cumulative_p, grad_ponder, grad_u if ctx.enter else None)
    grads = [g if g is None else g.contiguous() for g in grads]
    halt_bias, *saved = ctx.saved_tensors
    *first, dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt_weight, dhalt_bias, dnorm = gradients(
        halt_bias, ctx.eps, *grads, *saved, ctx.threshold, ctx.spend_remainder
    )
    # h_out' = h_out + ..., so the gradient of h_out is that of h_out'.
    dstate = (grad_h_out, dcumulative_p, None, dponder)
    dweights = (dlora_B, dlog_A, dlog_dt, dB, dhalt_weight, dhalt_bias, dnorm, None)
    return (*first, *dstate, *dweights, *[None] * 5)


def fake_gradients(first: Sequence[Tensor], rest: Sequence[Any]) -> tuple[Tensor, ...]:
    """Shapes of a backward op's results; first: like the gradients of h, e, f and the LoRA; rest: the arguments from
    cumulative_p on."""
    cumulative_p, _, _, _, _, lora_B, log_A, log_dt, B, halt_weight, norm_weight, *_ = rest
    like = (cumulative_p, cumulative_p, lora_B, log_A, log_dt, B, halt_weight, log_dt, norm_weight)
    return tuple(torch.empty_like(x) for x in (*first, *like))


def _fake_backward(*args):
    h, e, lora_hidden = args[5:8]
    return fake_gradients((h, e, h, lora_hidden), args[8:])


# Parts of the schemas of both ops.
STATE_SCHEMA = "Tensor h_out, Tensor cumulative_p, Tensor running, Tensor ponder"
_RATES_SCHEMA = "Tensor lora_B, Tensor log_A, Tensor log_dt, Tensor B, Tensor halt_weight"
WEIGHTS_SCHEMA = f"{_RATES_SCHEMA}, Tensor halt_bias, Tensor norm_weight, Tensor emb"
NUMBERS_SCHEMA = "int loop, float threshold, bool spend_remainder, bool enter, float eps"
RESULTS_SCHEMA = (
    "Tensor h_next, Tensor h_out_next, Tensor cumulative_p_next, Tensor running_next, Tensor ponder_next, Tensor u, "
    "Tensor p, Tensor rstd"
)
# Gradients of the outputs may be absent; without grad_u no norm follows.
GRADS_SCHEMA = "Tensor? grad_h, Tensor? grad_h_out, Tensor? grad_cumulative_p, Tensor? grad_ponder, Tensor? grad_u"
SAVED_SCHEMA = (
    f"Tensor cumulative_p, Tensor running, Tensor h_next, Tensor p, Tensor rstd, {_RATES_SCHEMA}, Tensor norm_weight, "
    "Tensor emb, float threshold, bool spend_remainder"
)
GRADIENTS_SCHEMA = f"Tensor cumulative_p, Tensor ponder, {_RATES_SCHEMA}, Tensor halt_bias, Tensor norm_weight"

LOOP_STEP = Op(
    f"loop_step(Tensor h, Tensor e, Tensor f, Tensor lora_hidden, {STATE_SCHEMA}, {WEIGHTS_SCHEMA}, {NUMBERS_SCHEMA}) "
    f"-> ({RESULTS_SCHEMA})",
    fake=fake_step,
    setup_context=lambda ctx, inputs, output: save(ctx, inputs, output, inputs[3:4]),
    backward=lambda ctx, *grads: backward_of(_gradients, ctx, grads),
    triton="openmythos_kernels.ops.loop.launch.step:loop_step",
    formula=formula.step,
)
LOOP_STEP_BACKWARD = Op(
    f"loop_step_backward({GRADS_SCHEMA}, Tensor h, Tensor e, Tensor lora_hidden, {SAVED_SCHEMA}) "
    f"-> (Tensor h, Tensor e, Tensor f, Tensor lora_hidden, {GRADIENTS_SCHEMA})",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.loop.launch.step:loop_step_backward",
)
_gradients: Again = Again(lambda halt_bias, eps, *args: LOOP_STEP_BACKWARD(*args), formula.step_backward)
