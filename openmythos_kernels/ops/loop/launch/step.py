"""Launches of the loop step's Triton kernels: outputs and grids."""

from __future__ import annotations

import torch
import triton

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.loop import configs
from openmythos_kernels.ops.loop.kernels import step as kernels
from openmythos_kernels.ops.loop.kernels import step_early
from openmythos_kernels.runtime import unproven
from openmythos_kernels.runtime.target import current


def _early(emb, D: int) -> bool:
    """Whether the kernels of `step_early.py` run."""
    return unproven.allowed() and D <= configs.WIDEST_EARLY and emb.numel() % step_early.EMBEDDED_MULTIPLE == 0


def loop_step(
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
    """`openmythos::loop_step`."""
    check_for_triton("h", h)
    N, D = cumulative_p.numel(), B.numel()
    h_next, h_out_next = torch.empty_like(h), torch.empty_like(h)
    cumulative_p_next, running_next, ponder_next = (torch.empty_like(x) for x in (cumulative_p, running, ponder))
    u = h.new_empty(h.shape if enter else (0,))
    p, rstd = torch.empty_like(cumulative_p), cumulative_p.new_empty(cumulative_p.shape if enter else (0,))
    if N and D:
        config = configs.forward(D, h.element_size())
        kernel, further = kernels.loop_step_kernel, {"AGAIN": config.block * h.element_size() > configs.WIDEST_KEPT}
        if _early(emb, D):
            config, kernel, further = configs.early(D, 8), step_early.loop_step_early_kernel, {}
        kernel[(triton.cdiv(N, config.rows),)](
            h,
            e,
            f,
            lora_hidden,
            h_out,
            cumulative_p,
            running.view(torch.uint8),
            ponder,
            lora_B,
            log_A,
            log_dt,
            B,
            halt_weight,
            halt_bias,
            norm_weight,
            emb,
            h_next,
            h_out_next,
            cumulative_p_next,
            running_next.view(torch.uint8),
            ponder_next,
            u,
            p,
            rstd,
            N,
            D,
            emb.numel(),
            loop,
            threshold,
            eps,
            RANK=lora_hidden.shape[-1],
            SPEND_REMAINDER=spend_remainder,
            ENTER=enter,
            **further,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.warps,
        )
    return h_next, h_out_next, cumulative_p_next, running_next, ponder_next, u, p, rstd


def loop_step_backward(
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
    """`openmythos::loop_step_backward`. The LoRA's two gradients are matrix products with df, left to the library."""
    check_for_triton("h", h)
    N, D = cumulative_p.numel(), B.numel()
    dh, de, df = torch.empty_like(h), torch.empty_like(e), torch.empty_like(h)
    dcumulative_p, dponder = torch.empty_like(cumulative_p), torch.empty_like(cumulative_p)
    if not (N and D):
        parameters = (lora_hidden, lora_B, log_A, log_dt, B, halt_weight, log_dt, norm_weight)
        dlora_hidden, dlora_B, dlog_A, dlog_dt, dB, dhalt, dbias, dnorm = (torch.zeros_like(x) for x in parameters)
        return dh, de, df, dlora_hidden, dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt, dbias, dnorm
    dlog_A, dB, dhalt, dnorm = (torch.empty_like(x) for x in (log_A, B, halt_weight, norm_weight))
    config = configs.backward(D, h.element_size())
    enter, whole = grad_u is not None, config.block >= D
    seen = running.view(torch.uint8)
    absent = h  # in place of a missing gradient, which the kernels never read
    on_weight, on_norm = (cumulative_p.new_empty(N if not whole else 0) for _ in range(2))
    out, entering = (absent if g is None else g for g in (grad_h_out, grad_u))
    if not whole:
        kernels.loop_dots_kernel[(N,)](
            out,
            entering,
            e,
            h_next,
            norm_weight,
            emb,
            on_weight,
            on_norm,
            N,
            D,
            emb.numel(),
            ENTER=enter,
            HAS_OUT=grad_h_out is not None,
            ROWS=1,
            BLOCK=configs.DOTS_BLOCK,
            num_warps=configs.warps(configs.DOTS_BLOCK, 8),
        )
    # Blocks enough to fill the GPU twice, but so few that their sums are small beside the rows.
    rows_each = triton.cdiv(triton.cdiv(N, 2 * current().units), config.rows) * config.rows
    blocks = triton.cdiv(N, rows_each)
    sums, bias, rates = cumulative_p.new_empty(blocks, 4, D), cumulative_p.new_empty(blocks), cumulative_p.new_empty(D)
    kernel, dots, further = kernels.loop_step_backward_kernel, [on_weight, on_norm], {"WHOLE": whole}
    if _early(emb, D):
        config, kernel, dots, further = configs.early(D, 4), step_early.loop_step_backward_early_kernel, [], {}
    kernel[(blocks, triton.cdiv(D, config.block))](
        absent if grad_h is None else grad_h,
        out,
        cumulative_p if grad_cumulative_p is None else grad_cumulative_p,
        cumulative_p if grad_ponder is None else grad_ponder,
        entering,
        h,
        e,
        cumulative_p,
        seen,
        h_next,
        p,
        rstd,
        log_A,
        log_dt,
        B,
        halt_weight,
        norm_weight,
        emb,
        *dots,
        dh,
        de,
        df,
        dcumulative_p,
        dponder,
        sums,
        bias,
        N,
        D,
        emb.numel(),
        rows_each,
        threshold,
        SPEND_REMAINDER=spend_remainder,
        ENTER=enter,
        HAS_H=grad_h is not None,
        HAS_OUT=grad_h_out is not None,
        HAS_SPENT=grad_cumulative_p is not None,
        HAS_PONDER=grad_ponder is not None,
        **further,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    kernels.loop_sums_kernel[(triton.cdiv(D, configs.SUMS_BLOCK),)](
        sums,
        log_A,
        log_dt,
        dlog_A,
        dB,
        dhalt,
        dnorm,
        rates,
        blocks,
        D,
        BLOCK=configs.SUMS_BLOCK,
        num_warps=configs.warps(configs.SUMS_BLOCK, 1),
    )
    dlora_hidden = df @ lora_B.t()
    dlora_B = lora_hidden.reshape(N, -1).t() @ df.reshape(N, D) if lora_B.shape[0] else torch.empty_like(lora_B)
    # Two long sums of scalars: in float64, in a fixed order.
    dlog_dt = rates.double().sum().to(log_dt.dtype).reshape(1)
    dbias = bias.double().sum().to(log_dt.dtype).reshape(1)
    return dh, de, df, dlora_hidden, dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt, dbias, dnorm
