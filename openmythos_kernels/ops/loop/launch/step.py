"""Launches of the loop step's Triton kernels: outputs, grids and the choice of configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from openmythos_kernels.ops.dtypes import check_for_triton
from openmythos_kernels.ops.loop.kernels import step as kernels
from openmythos_kernels.runtime.target import current

# Bytes of a row that one program of the backward pass holds: ten arrays of its length must fit the registers.
WIDEST = 8192
# Bytes of a row up to which the forward pass keeps e in registers beside h'; a wider row's e is read again.
WIDEST_KEPT = 32768
SUMS_BLOCK, DOTS_BLOCK = 128, 1024


@dataclass(frozen=True)
class Config:
    rows: int  # rows a program handles together
    block: int  # columns it handles together, a power of two
    warps: int


def forward_config(D: int, itemsize: int) -> Config:
    """Whole rows, sixteen elements a thread; several rows where one would leave a program short of work."""
    block = max(triton.next_power_of_2(D), 16)
    rows = max(1, min(16, 2048 // block))
    # With 1024 threads the widest rows of two-byte numbers would not fit the registers that are left to each.
    return Config(rows, block, _warps(rows * block, 32 if block > 8192 and itemsize == 2 else 16))


def backward_config(D: int, itemsize: int) -> Config:
    """Whole rows up to WIDEST, tiles of 1024 columns beyond; eight elements a thread, of the widest rows sixteen."""
    block = max(triton.next_power_of_2(D), 16)
    block = block if block * itemsize <= WIDEST else 1024
    rows = max(1, min(16, 1024 // block))
    return Config(rows, block, _warps(rows * block, 16 if block > 2048 else 8))


def _warps(elements: int, each: int) -> int:
    """Warps for that many elements; at most 1024 threads a program."""
    warp = current().warp
    return max(1, min(1024 // warp, elements // (each * warp)))


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
    """As the op of this name; see `step.py`."""
    check_for_triton("h", h)
    N, D = cumulative_p.numel(), B.numel()
    h_next, h_out_next = torch.empty_like(h), torch.empty_like(h)
    cumulative_p_next, running_next, ponder_next = (torch.empty_like(x) for x in (cumulative_p, running, ponder))
    u = h.new_empty(h.shape if enter else (0,))
    p, rstd = torch.empty_like(cumulative_p), cumulative_p.new_empty(cumulative_p.shape if enter else (0,))
    if N and D:
        config = forward_config(D, h.element_size())
        kernels.loop_step_kernel[(triton.cdiv(N, config.rows),)](
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
            AGAIN=config.block * h.element_size() > WIDEST_KEPT,
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
    """As the op of this name; the LoRA's two gradients are matrix products with df, left to the library."""
    check_for_triton("h", h)
    N, D = cumulative_p.numel(), B.numel()
    dh, de, df = torch.empty_like(h), torch.empty_like(e), torch.empty_like(h)
    dcumulative_p, dponder = torch.empty_like(cumulative_p), torch.empty_like(cumulative_p)
    dlog_A, dB, dhalt, dnorm = (torch.zeros_like(x) for x in (log_A, B, halt_weight, norm_weight))
    dlora_hidden, dlora_B, dlog_dt, dbias = (torch.zeros_like(x) for x in (lora_hidden, lora_B, log_dt, log_dt))
    if not (N and D):
        return dh, de, df, dlora_hidden, dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt, dbias, dnorm
    config = backward_config(D, h.element_size())
    enter, whole = grad_u is not None, config.block >= D
    seen = running.view(torch.uint8)
    absent = h  # stands for a gradient that is never read
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
            BLOCK=DOTS_BLOCK,
            num_warps=_warps(DOTS_BLOCK, 8),
        )
    # Enough blocks to fill the GPU twice, few enough that their sums stay small beside the rows.
    rows_each = triton.cdiv(triton.cdiv(N, 2 * current().units), config.rows) * config.rows
    blocks = triton.cdiv(N, rows_each)
    sums, bias, rates = cumulative_p.new_empty(blocks, 4, D), cumulative_p.new_empty(blocks), cumulative_p.new_empty(D)
    kernels.loop_step_backward_kernel[(blocks, triton.cdiv(D, config.block))](
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
        on_weight,
        on_norm,
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
        WHOLE=whole,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    kernels.loop_sums_kernel[(triton.cdiv(D, SUMS_BLOCK),)](
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
        BLOCK=SUMS_BLOCK,
        num_warps=_warps(SUMS_BLOCK, 1),
    )
    rank = lora_B.shape[0]
    if rank:
        dlora_hidden = df @ lora_B.t()
        dlora_B = lora_hidden.reshape(N, rank).t() @ df.reshape(N, D)
    # Two long sums of scalars, in double and in a fixed order.
    dlog_dt = rates.double().sum().to(log_dt.dtype).reshape(1)
    dbias = bias.double().sum().to(log_dt.dtype).reshape(1)
    return dh, de, df, dlora_hidden, dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt, dbias, dnorm
