"""The loop step by the modules of `openmythos`, with the ops' arguments and results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openmythos.injection import LTIInjection
from openmythos.layers import RMSNorm, at_least_fp32
from openmythos.recurrence import ACTHalting, ACTState, act_update
from openmythos_kernels.ops.derivatives import gradients_of


def down(f: Tensor, weight: Tensor) -> Tensor:
    """`loop_down`."""
    return F.linear(f, weight)


def down_backward(grad, f, weight):
    """`loop_down_backward`."""
    return tuple(gradients_of(lambda *args: (down(*args),), (f, weight), (grad,)))


def step(
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
) -> tuple[Tensor, ...]:
    """`loop_step`."""
    new = injected(h, e, f + lora_hidden @ lora_B, log_A, log_dt, B)
    p = probability(new, halt_weight, halt_bias)
    state = act_update(ACTState(h_out, cumulative_p, running, ponder), new, p, loop, threshold, spend_remainder)
    nothing = h.new_empty(0)
    u, rstd = nothing, cumulative_p.new_empty(0)
    if enter:
        u = _entering(new, e, norm_weight, emb, eps)
        with torch.no_grad():
            rstd = torch.rsqrt(at_least_fp32(_sum(new, e, emb)).square().mean(-1) + eps)
    return new, *state, u, p, rstd


def step_backward(halt_bias, eps, *args):
    """`loop_step_backward`, whose arguments follow the halting probability's bias and the norm's eps."""
    grads, (h, e, lora_hidden), rest = args[:5], args[5:8], args[8:]
    lora_B, *rates = rest[5:9]
    dnew, de, dcumulative_p, dponder, *dhalting = _after_backward(halt_bias, eps, grads, e, *rest)
    dh, also_de, dlora_hidden, dlora_B, *dinjection = gradients_of(
        lambda h, e, lora_hidden, lora_B, *rates: (injected(h, e, lora_hidden @ lora_B, *rates),),
        (h, e, lora_hidden, lora_B, *rates),
        (dnew,),
    )
    return dh, de + also_de, dnew, dlora_hidden, dcumulative_p, dponder, dlora_B, *dinjection, *dhalting


def lora_step(h, e, f, down, scale, *rest) -> tuple[Tensor, ...]:
    """`loop_lora_step`."""
    raw = f @ down.t()
    return *step(h, e, f, raw * scale, *rest), raw


def lora_step_backward(halt_bias, eps, *args):
    """`loop_lora_step_backward`, whose arguments follow the halting probability's bias and the norm's eps."""
    grads, (h, e, f, _, down, scale), rest = args[:5], args[5:11], args[11:]
    lora_B, *rates = rest[5:9]
    dnew, de, dcumulative_p, dponder, *dhalting = _after_backward(halt_bias, eps, grads, e, *rest)

    def before(h, e, f, down, scale, lora_B, *rates):
        return (injected(h, e, f + f @ down.t() * scale @ lora_B, *rates),)

    inputs = (h, e, f, down, scale, lora_B, *rates)
    dh, also_de, df, ddown, dscale, dlora_B, *dinjection = gradients_of(before, inputs, (dnew,))
    return dh, de + also_de, df, ddown, dscale, dcumulative_p, dponder, dlora_B, *dinjection, *dhalting


def _after_backward(
    halt_bias,
    eps,
    grads,
    e,
    cumulative_p,
    running,
    new,
    p,
    _rstd,
    _lora_B,
    _log_A,
    _log_dt,
    _B,
    halt_weight,
    norm_weight,
    emb,
    threshold,
    spend_remainder,
):
    """Gradients of the new state, e, cumulative_p, ponder, the halting weight and bias, and the norm's weight, through
    all that follows the new state. A position halts here where it halted in the kernel: p decides, not p computed
    again."""
    grad_h, grad_h_out, grad_cumulative_p, grad_ponder, grad_u = grads

    def after(new, e, cumulative_p, halt_weight, halt_bias, norm_weight):
        found = probability(new, halt_weight, halt_bias)
        before = ACTState(torch.zeros_like(new), cumulative_p, running, torch.zeros_like(cumulative_p))
        h_out, cumulative_p, _, ponder = act_update(
            before, new, found + (p - found).detach(), 0, threshold, spend_remainder
        )
        return h_out, cumulative_p, ponder, None if grad_u is None else _entering(new, e, norm_weight, emb, eps)

    grads = (grad_h_out, grad_cumulative_p, grad_ponder, grad_u)
    inputs = (new, e, cumulative_p, halt_weight, halt_bias, norm_weight)
    dnew, de, dcumulative_p, *dparameters = gradients_of(after, inputs, grads)
    dponder = torch.zeros_like(cumulative_p) if grad_ponder is None else grad_ponder.masked_fill(running, 0)
    return dnew if grad_h is None else dnew + grad_h, de, dcumulative_p, dponder, *dparameters


def injected(h, e, f, log_A, log_dt, B) -> Tensor:
    rates: Any = SimpleNamespace(log_A=log_A, log_dt=log_dt)
    layer: Any = SimpleNamespace(get_A=lambda: LTIInjection.get_A(rates), B=B)
    return LTIInjection.forward(layer, h, e, f)


def probability(new: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.device("meta"):
        act = ACTHalting(new.shape[-1])
    return torch.func.functional_call(act, {"halt.weight": weight, "halt.bias": bias}, (new,))


def _sum(new: Tensor, e: Tensor, emb: Tensor) -> Tensor:
    return new + F.pad(emb, (0, new.shape[-1] - emb.shape[0])) + e


def _entering(new: Tensor, e: Tensor, norm_weight: Tensor, emb: Tensor, eps: float) -> Tensor:
    norm: Any = SimpleNamespace(eps=eps, weight=norm_weight)
    return RMSNorm.forward(norm, _sum(new, e, emb))
