"""The parts of the loop step, for modules that swap only one: each is the fused step with the other parts switched off.

So one implementation serves all parts on every backend. A part that is off is skipped, or costs at most one pass over
(N, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.recurrence import ACTState
from openmythos_kernels.ops.loop.step import loop_step

# log(rate) at which A = exp(-exp(.)) is exactly 0.
NO_MEMORY = 20.0


def lti_update(h: Tensor, e: Tensor, f: Tensor, log_A: Tensor, log_dt: Tensor, B: Tensor) -> Tensor:
    """`A * h + B * e + f` with `A = exp(-exp(clamp(log_dt + log_A, -16.6, 20)))`; gradients for all six.

    Args:
        h, e, f: (..., D) in one of FLOATS. log_A, B: (D,). log_dt: (1,).

    Raises:
        ValueError: as `loop_step`.
    """
    none = B.new_zeros(1, B.numel())
    out = loop_step(
        h,
        e,
        f,
        *_nothing_before(h),
        B.new_empty(0, B.numel()),
        log_A,
        log_dt,
        B,
        none,
        none[0, :1],
        none[0],
        none[0, :0],
        0,
        1.0,
        False,
        False,
        0.0,
    )
    return out.h


def act_update(
    h: Tensor,
    h_out: Tensor,
    cumulative_p: Tensor,
    running: Tensor,
    ponder: Tensor,
    halt_weight: Tensor,
    halt_bias: Tensor,
    loop: int,
    threshold: float,
    spend_remainder: bool = False,
) -> ACTState:
    """The halting probability of the new state h, and ACT's bookkeeping with it; arguments as for `loop_step`."""
    D = h.shape[-1]
    zeros, seen = halt_weight.new_zeros(D), h.detach()
    lora_hidden = h.new_empty(*h.shape[:-1], 0)
    out = loop_step(
        seen,
        seen,
        h,
        lora_hidden,
        h_out,
        cumulative_p,
        running,
        ponder,
        zeros.new_empty(0, D),
        *_no_injection(zeros),
        halt_weight,
        halt_bias,
        zeros,
        zeros[:0],
        loop,
        threshold,
        spend_remainder,
        False,
        0.0,
    )
    return ACTState(out.h_out, out.cumulative_p, out.running, out.ponder)


def inject_norm(h: Tensor, e: Tensor, norm_weight: Tensor, emb: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`RMSNorm(h + emb + e)`, the block's input; emb (n,) is added to the first n channels.

    Raises:
        ValueError: as `loop_step`.
    """
    D = h.shape[-1]
    zeros = norm_weight.new_zeros(D)
    out = loop_step(
        h.detach(),
        e,
        h,
        *_nothing_before(h),
        zeros.new_empty(0, D),
        *_no_injection(zeros),
        zeros[None],
        zeros[:1],
        norm_weight,
        zeros[:0] if emb is None else emb,
        0,
        1.0,
        False,
        True,
        eps,
    )
    return out.u


def nothing_runs(h: Tensor) -> ACTState:
    """A state for a step without halting: no position runs."""
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    zeros = h.new_zeros(h.shape[:-1], dtype=wide)
    return ACTState(h.detach(), zeros, torch.zeros_like(zeros, dtype=torch.bool), zeros)


def _nothing_before(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lora_hidden, h_out, cumulative_p, running, ponder for a step without LoRA and halting."""
    return h.new_empty(*h.shape[:-1], 0), *nothing_runs(h)


def _no_injection(zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_A, log_dt, B of `h' = f`."""
    return torch.full_like(zeros, NO_MEMORY), zeros[:1], zeros
