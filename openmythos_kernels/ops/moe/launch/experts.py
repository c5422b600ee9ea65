"""Launches of all experts of a layer, forward and backward. No host reads; launches do not depend on N, K or E:

    forward     4 to sort, up, down, combine, and 2 for shared experts; up to configs.FEW tokens none to sort
    backward    4 to sort, down, up, combine, gates, 2 for weights; down, up and 2 for weights of shared experts
"""

from __future__ import annotations

from typing import Optional, Sequence

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
from openmythos_kernels.ops.moe.kernels.experts_few import few_down_kernel, few_up_kernel
from openmythos_kernels.ops.moe.kernels.experts_weights import down_weights_kernel, up_weights_kernel
from openmythos_kernels.ops.moe.launch import sort
from openmythos_kernels.ops.moe.launch.weights import matrices
from openmythos_kernels.ops.moe.sort import Order

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(x, expert_idx, gates, w_gate, w_up, w_down, shared_gate, shared_up, shared_down, save):
    """`openmythos::moe_experts`."""
    N, K = expert_idx.shape
    routed = _Experts("w", x, w_gate, w_up, w_down)
    shared = _Experts("shared", x, shared_gate, shared_up, shared_down)
    y = torch.empty_like(x)
    pre, shared_pre = x.new_empty(0), x.new_empty(0)
    if save:
        pre, shared_pre = x.new_empty(2, N * K, routed.I), x.new_empty(2, shared.E, N, shared.I)
    if not N:
        return y, pre, shared_pre
    extra = None
    if shared.E:
        extra = _dense_forward(x, shared, shared_pre if save else None)
    if N <= configs.FEW and not save:
        _combine(y, _few(x, expert_idx, routed), gates, expert_idx, None, routed.E, extra)
        return y, pre, shared_pre

    block = configs.rows(x.element_size(), N * K / routed.E)
    order = sort.forward(expert_idx, routed.E, block)
    act = x.new_empty(N * K, routed.I)
    config = configs.experts("up", x.element_size(), block)
    up_kernel[(len(order.tiles) * triton.cdiv(routed.I, config.n),)](
        x, order.tiles, order.offsets, order.pair, *routed.gate, *routed.up, act, pre if save else act, N, N * K,
        routed.E, K, routed.D, routed.I, routed.aligned, save, False, **config.constants(),
    )  # fmt: skip
    rows = x.new_empty(N * K, routed.D)
    config = configs.experts("down", x.element_size(), block)
    down_kernel[(len(order.tiles) * triton.cdiv(routed.D, config.n),)](
        act, order.tiles, order.offsets, *routed.down, rows, N,
        routed.E, routed.D, routed.I, routed.aligned, False, **config.constants(),
    )  # fmt: skip
    _combine(y, rows, gates, order.row, order.offsets, routed.E, extra)
    return y, pre, shared_pre


def backward(
    dy, x, expert_idx, gates, w_gate, w_up, w_down, shared_gate, shared_up, shared_down, pre, shared_pre,
    need_x, need_routed, need_shared,
):  # fmt: skip
    """`openmythos::moe_experts_backward`. The gradients of a list of weights are views of one tensor."""
    routed = _Experts("w", x, w_gate, w_up, w_down)
    shared = _Experts("shared", x, shared_gate, shared_up, shared_down)
    dw, dshared = _gradients(routed, need_routed), _gradients(shared, need_shared and shared.E > 0)
    if not len(x):
        for dweights in (*dw, *dshared):
            dweights.zero_()
    dx, dgates = _backward(dy, x, expert_idx, gates, routed, shared, pre, shared_pre, need_x, dw, dshared, False)
    return dx, dgates, *(list(ws) for ws in (*dw, *dshared))


def backward_add(
    dy, x, expert_idx, gates, w_gate, w_up, w_down, shared_gate, shared_up, shared_down, pre, shared_pre, need_x,
    dw_gate, dw_up, dw_down, dshared_gate, dshared_up, dshared_down,
):  # fmt: skip
    """`openmythos::moe_experts_backward_add`, to what `backward` returned."""
    routed = _Experts("w", x, w_gate, w_up, w_down)
    shared = _Experts("shared", x, shared_gate, shared_up, shared_down)
    dw = [_stacked(ws) for ws in (dw_gate, dw_up, dw_down)]
    dshared = [_stacked(ws) for ws in (dshared_gate, dshared_up, dshared_down)]
    return _backward(dy, x, expert_idx, gates, routed, shared, pre, shared_pre, need_x, dw, dshared, True)


def _backward(dy, x, expert_idx, gates, routed, shared, pre, shared_pre, need_x, dw, dshared, add):
    """dx and dgates; the weights' gradients go to dw and dshared, where these are not empty."""
    N, K = expert_idx.shape
    dx, dgates = x.new_empty(x.shape if need_x else 0), gates.new_empty(gates.shape)
    if not N:
        return dx, dgates
    extra = None
    if shared.E and (need_x or len(dshared[0])):
        extra = _dense_backward(dy, x, shared, shared_pre, dshared, need_x, add)

    size, E, D, I, P = x.element_size(), routed.E, routed.D, routed.I, N * K
    block = configs.rows(size, P / E)
    order = sort.forward(expert_idx, E, block)
    config = configs.experts("down_backward", size, block)
    columns = triton.cdiv(I, config.n)
    dpre, act = x.new_empty(2, P, I), x.new_empty(P, I)
    parts = x.new_empty((columns, P), dtype=torch.float32)
    down_backward_kernel[(len(order.tiles) * columns,)](
        dy, order.tiles, order.offsets, order.pair, gates, *routed.down, pre, dpre, act, parts, N, P,
        E, K, D, I, routed.aligned, False, **config.constants(),
    )  # fmt: skip
    gate_gradient_kernel[(triton.cdiv(P, 128),)](parts, order.row, order.offsets, dgates, P, E, columns, 128)
    if need_x:
        rows = x.new_empty(P, D)
        config = configs.experts("up_backward", size, block)
        up_backward_kernel[(len(order.tiles) * triton.cdiv(D, config.n),)](
            dpre, order.tiles, order.offsets, *routed.gate, *routed.up, rows, N, P,
            E, D, I, routed.aligned, False, **config.constants(),
        )  # fmt: skip
        _combine(dx, rows, None, order.row, order.offsets, E, extra)
    if len(dw[0]):
        _weights(x, dy, dpre, act, order, K, routed, dw, add)
    return dx, dgates


class _Experts:
    """The weights of E equal experts in the kernels' form, checked.

    Raises:
        ValueError: a shape or dtype that does not fit x.
    """

    def __init__(self, name: str, x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]):
        if x.dtype not in _DTYPES:
            raise ValueError(f"the Triton kernels take {_DTYPES}, got {x.dtype}")
        self.E, self.D, self.I, self.aligned = len(gate), x.shape[1], 0, True
        if not self.E:
            return
        self.I, self.dtype = gate[0].shape[0], gate[0].dtype
        if self.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}_gate[0]: got {self.dtype} {tuple(gate[0].shape)}, must be {x.dtype} or float32")
        tables, self._alive = [], []  # copies of matrices that are not contiguous have no other owner
        for part, weights in (("gate", gate), ("up", up), ("down", down)):
            shape = torch.Size((self.D, self.I) if part == "down" else (self.I, self.D))
            dense = [w if w.is_contiguous() else w.contiguous() for w in weights]
            self._alive.append(dense)
            tables.append(matrices(f"{name}_{part}", dense, shape, self.dtype, x.device))
        self.aligned = all(table.aligned for table in tables)
        self.gate, self.up, self.down = ((table.base, table.offsets) for table in tables)


def _gradients(experts: _Experts, needed: bool) -> tuple:
    """Gradients of gate, up and down, stacked; empty lists if they are not needed."""
    if not needed:
        return [], [], []
    E, D, I = experts.E, experts.D, experts.I
    like = experts.gate[0]
    return like.new_empty(E, I, D), like.new_empty(E, I, D), like.new_empty(E, D, I)


def _stacked(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """The one tensor that a list of gradients made here is views of; an empty list stays one."""
    if not gradients:
        return gradients
    first = gradients[0]
    step = first.numel() * first.element_size()
    if any(g.data_ptr() != first.data_ptr() + i * step for i, g in enumerate(gradients)):
        raise ValueError("dw: the Triton kernels add to gradients that lie one behind the other, as the first call made them")
    return first.as_strided((len(gradients), *first.shape), (first.numel(), *first.stride()))


def _few(x: Tensor, expert_idx: Tensor, routed: _Experts) -> Tensor:
    """What each pair's expert makes of its token, (N * K, D); rows of pairs without an expert are not written."""
    (N, K), size = expert_idx.shape, x.element_size()
    act, rows = x.new_empty(N * K, routed.I), x.new_empty(N * K, routed.D)
    config = configs.experts("up", size, configs.FEW)
    few_up_kernel[(N * K * triton.cdiv(routed.I, config.n),)](
        x, expert_idx, *routed.gate, *routed.up, act, N,
        routed.E, K, routed.D, routed.I, routed.aligned, **config.constants(),
    )  # fmt: skip
    config = configs.experts("few_down", size)
    few_down_kernel[(N * K * triton.cdiv(routed.D, config.n),)](
        act, expert_idx, *routed.down, rows, N,
        routed.E, K, routed.D, routed.I, routed.aligned, **config.constants(),
    )  # fmt: skip
    return rows


def _dense_forward(x: Tensor, experts: _Experts, pre: Optional[Tensor]) -> Tensor:
    """The sum of experts that see every token, as one wide expert."""
    N, (E, D, I), size = x.shape[0], (experts.E, experts.D, experts.I), x.element_size()
    block = configs.rows(size, N)
    act, y = x.new_empty(E, N, I), torch.empty_like(x)
    config = configs.experts("up", size, block)
    up_kernel[(E * triton.cdiv(N, block) * triton.cdiv(I, config.n),)](
        x, None, None, None, *experts.gate, *experts.up, act, act if pre is None else pre, N, E * N,
        E, 1, D, I, experts.aligned, pre is not None, True, **config.constants(),
    )  # fmt: skip
    config = configs.experts("few_dense_down", size) if block == configs.FEW else configs.experts("down", size, block)
    down_kernel[(triton.cdiv(N, block) * triton.cdiv(D, config.n),)](
        act, None, None, *experts.down, y, N, E, D, I, experts.aligned, True, **config.constants()
    )
    return y


def _dense_backward(dy, x, experts: _Experts, pre, dweights, need_x: bool, add: bool) -> Optional[Tensor]:
    """dx of experts that see every token, or None; fills dweights unless they are empty."""
    N, (E, D, I), size = x.shape[0], (experts.E, experts.D, experts.I), x.element_size()
    block = configs.rows(size, N)
    dpre, act = x.new_empty(2, E, N, I), x.new_empty(E, N, I)
    config = configs.experts("down_backward", size, block)
    down_backward_kernel[(E * triton.cdiv(N, block) * triton.cdiv(I, config.n),)](
        dy, None, None, None, None, *experts.down, pre, dpre, act, None, N, E * N,
        E, 1, D, I, experts.aligned, True, **config.constants(),
    )  # fmt: skip
    dx = None
    if need_x:
        dx = torch.empty_like(x)
        config = configs.experts("up_backward", size, block)
        up_backward_kernel[(triton.cdiv(N, block) * triton.cdiv(D, config.n),)](
            dpre, None, None, *experts.gate, *experts.up, dx, N, E * N,
            E, D, I, experts.aligned, True, **config.constants(),
        )  # fmt: skip
    if len(dweights[0]):
        _weights(x, dy, dpre, act, None, 1, experts, dweights, add)
    return dx


def _weights(x, dy, dpre, act, order: Optional[Order], K: int, experts: _Experts, dweights, add: bool) -> None:
    N, R, (E, D, I) = x.shape[0], act.numel() // experts.I, (experts.E, experts.D, experts.I)
    offsets, pair = (None, None) if order is None else (order.offsets, order.pair)
    dgate, dup, ddown = dweights
    config = configs.experts("up_weights", x.element_size())
    up_weights_kernel[(E * triton.cdiv(I, config.m) * triton.cdiv(D, config.n),)](
        x, dpre, offsets, pair, dgate, dup, N, R, K, D, I, order is None, add, **config.constants()
    )
    config = configs.experts("down_weights", x.element_size())
    down_weights_kernel[(E * triton.cdiv(D, config.m) * triton.cdiv(I, config.n),)](
        dy, act, offsets, pair, ddown, N, K, D, I, order is None, add, **config.constants()
    )


def _combine(y, rows, gates, where, offsets, experts: int, extra) -> None:
    """Sums each token's rows; sorted if there are offsets, else in the order of pairs."""
    (N, D), K = y.shape, where.numel() // y.shape[0]
    block = min(1024, max(32, triton.next_power_of_2(D)))
    combine_kernel[(N * triton.cdiv(D, block),)](
        rows, gates, where, offsets, extra, y,
        experts, K, D, offsets is not None, gates is not None, extra is not None, block,
    )  # fmt: skip
