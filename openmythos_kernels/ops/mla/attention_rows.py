"""Per-head latent attention of packed rows: queries at positions of their own, any number of them per sequence.

A frozen loop computes only the tokens that still run, while these attend to all tokens before them. Their queries are
packed: rows offset[b] .. offset[b + 1] belong to sequence b. `openmythos_kernels.ops.mla.attention` defines scores and
results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmythos import debug
from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime.backends import choose


def attention_rows(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, position: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal attention of rows: row n of sequence b sees the keys j <= position[n] of that sequence.

    Keys behind a sequence's last row are never read and get zero gradients. float64, and devices without a kernel, take
    the formula.

    Args:
        q_nope: (N, H, nope), one of FLOATS. q_rope: (N, H, rope), rotated.
        kv: (B, S, H, nope + v), [k_nope | v] as `kv_up` makes it, of all tokens. k_rope: (B, S, rope), rotated.
        position: (N,) int64, each row's place among the keys of its sequence, below S; ascending within a sequence, no
            place twice.
        offset: (B + 1,) int64, ascending from 0 to N. A sequence may have no row.

    Returns:
        out (N, H, v) in q's dtype, and lse (H, N) float32, the base-2 logarithm of the sum of exp(score), without a
        gradient. Sums are float32 (float64 for float64).

    Raises:
        ValueError: an argument's shape, dtype or device is not as above; on a CPU and under the debug switch, the
            values of position or offset are not.
    """
    if q_nope.dim() != 3 or q_nope.dtype not in FLOATS:
        raise ValueError(f"q_nope: got {q_nope.dtype} {tuple(q_nope.shape)}, must be (N, H, nope) in one of {FLOATS}")
    N, H, nope = q_nope.shape
    B, S = k_rope.shape[:2] if k_rope.dim() == 3 else (-1, -1)
    rope, width = q_rope.shape[-1], max(kv.shape[-1], nope + 1)
    for name, x, shape, dtype in (
        ("q_rope", q_rope, (N, H, rope), q_nope.dtype),
        ("k_rope", k_rope, (B, S, rope), q_nope.dtype),
        ("kv", kv, (B, S, H, width), q_nope.dtype),
        ("position", position, (N,), torch.int64),
        ("offset", offset, (B + 1,), torch.int64),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q_nope.device:
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, must be {dtype} {shape} on {q_nope.device}"
            )
    _check_values(position, offset, S)
    compute: Any = mla_attention_rows if _has_kernel(q_nope) else formula.attention_rows
    return compute(q_nope, q_rope, kv, k_rope, position.contiguous(), offset.contiguous())


def attention_rows_backward(
    grad_out: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    position: Tensor,
    offset: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q_nope, q_rope, kv and k_rope for grad_out, the gradient of out: for a caller that keeps
    `attention_rows`' results itself. Differentiable."""
    inputs = q_nope, q_rope, kv, k_rope
    if _has_kernel(q_nope):
        return _gradients(grad_out, *inputs, position, offset, out, lse)
    if torch.is_grad_enabled():
        return formula.attention_rows_backward(grad_out, *inputs, position, offset, out, lse)
    # The formula has gradients of what requires them alone.
    q_nope, q_rope, kv, k_rope = (x.detach().requires_grad_() for x in inputs)
    found = formula.attention_rows_backward(grad_out, q_nope, q_rope, kv, k_rope, position, offset, out, lse)
    dq_nope, dq_rope, dkv, dk_rope = (x.detach() for x in found)
    return dq_nope, dq_rope, dkv, dk_rope


def _has_kernel(q_nope: Tensor) -> bool:
    return q_nope.dtype != torch.float64 and choose("mla_attention_rows", q_nope.device.type).fast


def _check_values(position: Tensor, offset: Tensor, S: int) -> None:
    """Under the debug switch, what the C++ kernel always checks."""
    N = len(position)

    def ascends(offset):
        right = (offset.diff(prepend=offset[:1]) >= 0) & (offset <= N)
        right[0] &= offset[0] == 0
        right[-1] &= offset[-1] == N
        return right

    def fits(position):
        first_of_sequence = torch.isin(torch.arange(N, device=position.device), offset)
        ascends = first_of_sequence | (position.diff(prepend=position[:1]) > 0)
        return (position >= 0) & (position < S) & ascends

    debug.check_values("offset", offset, ascends, f"ascending from 0 to N = {N}")
    debug.check_values("position", position, fits, f"in [0, {S}), and ascending in a sequence")


def _fake(q_nope, q_rope, kv, k_rope, position, offset):
    N, H, nope = q_nope.shape
    return q_nope.new_empty(N, H, kv.shape[-1] - nope), q_nope.new_empty((H, N), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_out, _grad_lse):
    if grad_out is None:
        return (None,) * 6
    return (*_gradients(grad_out, *ctx.saved_tensors), None, None)


def _fake_backward(grad_out, q_nope, q_rope, kv, k_rope, position, offset, out, lse):
    return tuple(x.new_empty(x.shape) for x in (q_nope, q_rope, kv, k_rope))


# Queries and keys may have any strides, position and offset are dense; results are contiguous.
mla_attention_rows = Op(
    "mla_attention_rows(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor position, Tensor offset) "
    "-> (Tensor out, Tensor lse)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.mla.launch.attention:forward_rows",
    formula=formula.attention_rows,
)

# Returns the gradients of q_nope, q_rope, kv and k_rope, the last summed over the heads in float32. No float atomics:
# same inputs, same bits.
mla_attention_rows_backward = Op(
    "mla_attention_rows_backward(Tensor grad_out, Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, "
    "Tensor position, Tensor offset, Tensor out, Tensor lse) -> "
    "(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope)",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.mla.launch.attention:backward_rows",
)
_gradients = Again(mla_attention_rows_backward, formula.attention_rows_backward)
