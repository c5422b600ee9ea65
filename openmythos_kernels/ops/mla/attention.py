"""`openmythos::mla_attention`: causal latent attention in its per-head form, for prompts and training.

    score[b,h,i,j] = (q_nope[b,i,h] . k_nope[b,j,h] + q_rope[b,i,h] . k_rope[b,j]) * (nope + rope)^-0.5
    out[b,i,h]     = softmax over visible j (score) @ v[b,j,h]

A token's one rotary key serves all heads and is read in place: keys are never concatenated or copied per head, and no
(T, S) matrix is written. `openmythos.attention.attend` defines the results.

This op saves its inputs, out and lse for the backward. The module can keep the latents alone
(`openmythos_kernels.nn.paths.mla_recompute`): then k_nope, v and out are recomputed, out inside the backward kernel,
from the softmax weights that the gradients need anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos import debug
from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import KERNEL_FLOATS
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.ops.op import Op


def attention(
    q_nope: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    start: int | Tensor | None = 0,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention with keys [k_nope per head | k_rope shared].

    Query i of row b sees the keys j <= start[b] + i with j < key_lengths[b]. Keys from key_lengths[b] on are never read
    and get zero gradients. A query that sees nothing has out 0 and lse -inf.

    Args:
        q_nope: (B, T, H, nope), one of KERNEL_FLOATS. q_rope: (B, T, H, rope), rotated. Two tensors, as the two
            up-projections make them; views of one tensor work as well.
        kv: (B, S, H, nope + v), [k_nope | v] as `kv_up` makes it.
        k_rope: (B, S, rope), rotated.
        start: position of the first query among the keys, an int or (B,) int64; None: every query sees all keys.
        key_lengths: (B,) int64, in [0, S]; None: S in every row.

    Returns:
        out (B, T, H, v) in q's dtype, and lse (B, H, T) float32, the base-2 logarithm of the sum of exp(score), without
        a gradient. lse is what the kernels computed: rounding it again would shift whole rows of gradients. Sums are
        float32.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above; on a CPU and under the debug switch, a length
            is not. A GPU takes lengths outside [0, S] for the nearest one inside.
    """
    if q_nope.dim() != 4 or q_nope.dtype not in KERNEL_FLOATS:
        raise ValueError(
            f"q_nope: got {q_nope.dtype} {tuple(q_nope.shape)}, must be (B, T, H, nope) in one of {KERNEL_FLOATS}"
        )
    B, T, H, nope = q_nope.shape
    rope, S = q_rope.shape[-1], k_rope.shape[1] if k_rope.dim() == 3 else -1
    for name, x, shape in (
        ("q_rope", q_rope, (B, T, H, rope)),
        ("k_rope", k_rope, (B, S, rope)),
        ("kv", kv, (B, S, H, max(kv.shape[-1], nope + 1))),
    ):
        if x.shape != shape or x.dtype != q_nope.dtype or x.device != q_nope.device:
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, "
                f"must be {q_nope.dtype} {shape} on {q_nope.device}"
            )
    return mla_attention(q_nope, q_rope, kv, k_rope, *bounds(q_nope, k_rope, start, key_lengths))


def bounds(
    q_nope: Tensor, k_rope: Tensor, start: int | Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """start and key_lengths of `attention` in the op's form: (B,) int64 both."""
    B, S = k_rope.shape[:2]
    if not isinstance(start, Tensor):
        start = torch.full((B,), S if start is None else start, dtype=torch.int64, device=q_nope.device)
    if key_lengths is None:
        key_lengths = torch.full((B,), S, dtype=torch.int64, device=q_nope.device)
    for name, x in (("start", start), ("key_lengths", key_lengths)):
        if x.dtype != torch.int64 or x.shape != (B,) or x.device != q_nope.device:
            raise ValueError(
                f"{name}: got {x.dtype} {tuple(x.shape)} on {x.device}, must be torch.int64 {(B,)} on {q_nope.device}"
            )
    debug.check_values("key_lengths", key_lengths, lambda n: (n >= 0) & (n <= S), f"in [0, {S}]")
    return start.contiguous(), key_lengths.contiguous()


def _fake(q_nope, q_rope, kv, k_rope, start, key_lengths):
    B, T, H, nope = q_nope.shape
    return q_nope.new_empty(B, T, H, kv.shape[-1] - nope), q_nope.new_empty((B, H, T), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_out, _grad_lse):
    if grad_out is None:
        return (None,) * 6
    return (*_gradients(grad_out, *ctx.saved_tensors), None, None)


def _fake_backward(grad_out, q_nope, q_rope, kv, k_rope, start, key_lengths, out, lse):
    made = grad_out.new_empty(grad_out.shape if out is None else 0)
    return (*(x.new_empty(x.shape) for x in (q_nope, q_rope, kv, k_rope)), made)


# Queries and keys may have any strides, start and key_lengths are dense; results are contiguous.
mla_attention = Op(
    "mla_attention(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor start, Tensor key_lengths) "
    "-> (Tensor out, Tensor lse)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.mla.launch.attention:forward",
    formula=formula.attention,
)

# Returns the gradients of q_nope, q_rope, kv and k_rope, the last summed over the heads in float32; and the output if
# it was not kept (out None). No float atomics: same inputs, same bits.
mla_attention_backward = Op(
    "mla_attention_backward(Tensor grad_out, Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor start, "
    "Tensor key_lengths, Tensor? out, Tensor lse) -> "
    "(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor out)",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.mla.launch.attention:backward",
)
_gradients = Again(lambda *args: mla_attention_backward(*args)[:4], formula.attention_backward)
