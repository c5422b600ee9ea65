"""Launches of all experts of a layer, forward and backward.

The host reads nothing from the device, and the number of launches does not depend on N, K or E:

    forward     4 to sort, up, down, combine; 2 for shared experts; up to configs.GEMV tokens there is no sort
    backward    4 to sort, down, up, combine, topk_weights, 2 for weights; down, up and 2 for weights of shared experts

Beyond configs.LIBRARY tokens a shared expert is the library's products and one kernel (`dense.py`).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from openmythos_kernels.ops.moe import configs
from openmythos_kernels.ops.moe.kernels.experts import combine_kernel, down_kernel, up_kernel
from openmythos_kernels.ops.moe.kernels.experts_backward import (
    down_backward_kernel,
    gate_gradient_kernel,
    up_backward_kernel,
)
from openmythos_kernels.ops.moe.kernels.experts_gemv import few_down_kernel, few_up_kernel
from openmythos_kernels.ops.moe.launch import dense, gradients, sort
from openmythos_kernels.ops.moe.launch.weights import Experts


def forward(x, expert_idx, topk_weights, *rest):
    """`openmythos::moe_experts`."""
    *weights, save = rest
    N, K = expert_idx.shape
    routed, shared = _experts(x, weights)
    y = torch.empty_like(x)
    pre, shared_pre = x.new_empty(0), x.new_empty(0)
    if save:
        pre, shared_pre = x.new_empty(2, N * K, routed.I), x.new_empty(2, shared.E, N, shared.I)
    if not N:
        return y, pre, shared_pre
    extra = None
    if shared.E:
        extra = dense.forward(x, shared, shared_pre if save else None)
    if N <= configs.GEMV and not save:
        _combine(y, _gemv(x, expert_idx, routed), topk_weights, expert_idx, None, routed.E, extra)
        return y, pre, shared_pre

    block = configs.rows(x.element_size(), N * K / routed.E)
    order = sort.forward(expert_idx, routed.E, block)
    act = x.new_empty(N * K, routed.I)
    config = configs.experts("up", x.element_size(), block)
    up_kernel[(len(order.tiles) * triton.cdiv(routed.I, config.n),)](
        x,
        order.tiles,
        order.offsets,
        order.pair,
        *routed.gate,
        *routed.up,
        act,
        pre if save else act,
        N,
        N * K,
        routed.E,
        K,
        routed.D,
        routed.I,
        routed.aligned,
        save,
        False,
        **config.constants(),
    )
    rows = x.new_empty(N * K, routed.D)
    config = configs.experts("down", x.element_size(), block)
    down_kernel[(len(order.tiles) * triton.cdiv(routed.D, config.n),)](
        act,
        order.tiles,
        order.offsets,
        *routed.down,
        rows,
        N,
        routed.E,
        routed.D,
        routed.I,
        routed.aligned,
        False,
        **config.constants(),
    )
    _combine(y, rows, topk_weights, order.row, order.offsets, routed.E, extra)
    return y, pre, shared_pre


def backward(dy, x, expert_idx, topk_weights, *rest):
    """`openmythos::moe_experts_backward`. The gradients of a list of weights are views of one tensor."""
    *weights, pre, shared_pre, need_x, need_routed, need_shared, _ = rest
    routed, shared = _experts(x, weights)
    dw, dshared = gradients.allocated(routed, need_routed), gradients.allocated(shared, need_shared and shared.E > 0)
    if not len(x):
        for dweights in (*dw, *dshared):
            dweights.zero_()
    dx, dtopk_weights = _backward(
        dy, x, expert_idx, topk_weights, routed, shared, pre, shared_pre, need_x, dw, dshared, False
    )
    return dx, dtopk_weights, *(list(ws) for ws in (*dw, *dshared))


def backward_add(dy, x, expert_idx, topk_weights, *rest):
    """`openmythos::moe_experts_backward_add`: adds to the gradients that `backward` returned."""
    weights, (pre, shared_pre, need_x), sums = rest[:6], rest[6:9], rest[9:]
    routed, shared = _experts(x, weights)
    dw, dshared = ([gradients.stacked(ws) for ws in part] for part in (sums[:3], sums[3:]))
    return _backward(dy, x, expert_idx, topk_weights, routed, shared, pre, shared_pre, need_x, dw, dshared, True)


def backward_rows(dy, x, expert_idx, topk_weights, *rest):
    """`openmythos::moe_experts_backward_rows`."""
    weights, (pre, shared_pre, need_x, add), dshared, rows = rest[:6], rest[6:10], rest[10:13], rest[13:]
    routed, shared = _experts(x, weights)
    stacked = [gradients.stacked(ws) for ws in dshared]
    none: tuple = ([], [], [])
    return _backward(dy, x, expert_idx, topk_weights, routed, shared, pre, shared_pre, need_x, none, stacked, add, rows)


def _experts(x, weights) -> tuple[Experts, Experts]:
    """The routed and the shared experts, of six lists of weights."""
    return Experts("w", x, *weights[:3]), Experts("shared", x, *weights[3:])


def _backward(dy, x, expert_idx, topk_weights, routed, shared, pre, shared_pre, need_x, dw, dshared, add, kept=None):
    """dx and dtopk_weights. Fills dw and dshared unless they are empty, or adds to them with `add`. kept: memory for
    what dw are products of: dpre, act, and the order's offsets and pair."""
    N, K = expert_idx.shape
    dx, dtopk_weights = x.new_empty(x.shape if need_x else 0), topk_weights.new_empty(topk_weights.shape)
    if not N:
        if kept is not None:
            kept[2].zero_()
        return dx, dtopk_weights
    extra = None
    if shared.E and (need_x or len(dshared[0])):
        extra = dense.backward(dy, x, shared, shared_pre, dshared, need_x, add)

    size, E, D, I, P = x.element_size(), routed.E, routed.D, routed.I, N * K
    block = configs.rows(size, P / E)
    order = sort.forward(expert_idx, E, block)
    config = configs.experts("down_backward", size, block)
    columns = triton.cdiv(I, config.n)
    if kept is None:
        dpre, act = x.new_empty(2, P, I), x.new_empty(P, I)
    else:
        dpre, act, offsets, pair = kept
        offsets.copy_(order.offsets)
        pair.copy_(order.pair)
    parts = x.new_empty((columns, P), dtype=torch.float32)
    down_backward_kernel[(len(order.tiles) * columns,)](
        dy,
        order.tiles,
        order.offsets,
        order.pair,
        topk_weights,
        *routed.down,
        pre,
        dpre,
        act,
        parts,
        N,
        P,
        E,
        K,
        D,
        I,
        routed.aligned,
        False,
        **config.constants(),
    )
    gate_gradient_kernel[(triton.cdiv(P, 128),)](parts, order.row, order.offsets, dtopk_weights, P, E, columns, 128)
    if need_x:
        rows = x.new_empty(P, D)
        config = configs.experts("up_backward", size, block)
        up_backward_kernel[(len(order.tiles) * triton.cdiv(D, config.n),)](
            dpre,
            order.tiles,
            order.offsets,
            *routed.gate,
            *routed.up,
            rows,
            N,
            P,
            E,
            D,
            I,
            routed.aligned,
            False,
            **config.constants(),
        )
        _combine(dx, rows, None, order.row, order.offsets, E, extra)
    if len(dw[0]):
        gradients.launch(x, dy, dpre, act, order, K, routed, dw, add)
    return dx, dtopk_weights


def _gemv(x: Tensor, expert_idx: Tensor, routed: Experts) -> Tensor:
    """The output of each pair's expert for its token, (N * K, D); rows of pairs without an expert are not written."""
    (N, K), size = expert_idx.shape, x.element_size()
    act, rows = x.new_empty(N * K, routed.I), x.new_empty(N * K, routed.D)
    config = configs.experts("up", size, configs.GEMV)
    few_up_kernel[(N * K * triton.cdiv(routed.I, config.n),)](
        x,
        expert_idx,
        *routed.gate,
        *routed.up,
        act,
        N,
        routed.E,
        K,
        routed.D,
        routed.I,
        routed.aligned,
        **config.constants(),
    )
    config = configs.experts("gemv_down", size)
    few_down_kernel[(N * K * triton.cdiv(routed.D, config.n),)](
        act, expert_idx, *routed.down, rows, N, routed.E, K, routed.D, routed.I, routed.aligned, **config.constants()
    )
    return rows


def _combine(y, rows, topk_weights, where, offsets, experts: int, extra) -> None:
    """Sums each token's rows, which are sorted by expert if there are offsets, else in the order of pairs."""
    (N, D), K = y.shape, where.numel() // y.shape[0]
    block = min(1024, max(32, triton.next_power_of_2(D)))
    combine_kernel[(N * triton.cdiv(D, block),)](
        rows,
        topk_weights,
        where,
        offsets,
        extra,
        y,
        experts,
        K,
        D,
        offsets is not None,
        topk_weights is not None,
        extra is not None,
        block,
    )
