"""`openmythos::swiglu_ffn`: a dense SwiGLU feed-forward layer in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again, saves
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.moe import formula
from openmythos_kernels.ops.op import Op

MANY = 256  # tokens from which faster products are worth a copy of the weights


def swiglu_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down(silu(gate x) * up x)`, differentiable in everything. Saves x, `gate x` and `up x` for the backward.

    Args:
        x: (..., D), one of FLOATS.
        gate, up: (I, D); down: (D, I); all in x's dtype.

    Returns:
        x's shape and dtype. Sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape or dtype is not as above; names the argument.
    """
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, must be (..., D) in one of {FLOATS}")
    inner, dim = gate.shape[0], x.shape[-1]
    weights = {"gate": (gate, (inner, dim)), "up": (up, (inner, dim)), "down": (down, (dim, inner))}
    for name, (weight, shape) in weights.items():
        if weight.shape != shape or weight.dtype != x.dtype:
            raise ValueError(f"{name}: got {weight.dtype} {tuple(weight.shape)}, must be {x.dtype} {shape}")
    tensors = (x.reshape(-1, dim).contiguous(), gate.contiguous(), up.contiguous(), down.contiguous())
    return SWIGLU_FFN(*tensors, saves(tensors))[0].view_as(x)


def inner_width(tokens: int, inner: int, dtype: torch.dtype) -> int:
    """The inner width that a GPU computes with: for many tokens in 16 bits a multiple of 8, the 16 bytes of a wide
    load."""
    return inner + -inner % 8 if dtype.itemsize == 2 and tokens >= MANY else inner


def _fake(x, gate, up, down, save):
    tokens, inner = x.shape[0], gate.shape[0]
    width = inner_width(tokens, inner, x.dtype) if x.device.type == "cuda" else inner
    return torch.empty_like(x), x.new_empty((2, 1, tokens, width) if save else 0)


def _setup_context(ctx, inputs, output):
    *tensors, save = inputs
    ctx.save = save
    ctx.need_x, ctx.need_weights = tensors[0].requires_grad, any(w.requires_grad for w in tensors[1:])
    ctx.set_materialize_grads(False)  # no zeros for the saved tensor
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    if not ctx.save:
        raise RuntimeError("swiglu_ffn: gradients need the op to be called with save=True")
    dx, *dweights = _gradients(dy.contiguous(), *ctx.saved_tensors, ctx.need_x, ctx.need_weights)
    return (dx if ctx.need_x else None, *(dweights if ctx.need_weights else (None,) * 3), None)


def _fake_backward(dy, x, gate, up, down, saved, need_x, need_weights):
    return (
        x.new_empty(x.shape if need_x else 0),
        *(w.new_empty(w.shape if need_weights else 0) for w in (gate, up, down)),
    )


SWIGLU_FFN = Op(
    "swiglu_ffn(Tensor x, Tensor gate, Tensor up, Tensor down, bool save) -> (Tensor y, Tensor saved)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="openmythos_kernels.ops.moe.launch.ffn:forward",
    formula=formula.ffn,
)
SWIGLU_FFN_BACKWARD = Op(
    "swiglu_ffn_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor saved, bool need_x,"
    " bool need_weights) -> (Tensor dx, Tensor dgate, Tensor dup, Tensor ddown)",
    fake=_fake_backward,
    triton="openmythos_kernels.ops.moe.launch.ffn:backward",
)
_gradients = Again(SWIGLU_FFN_BACKWARD, formula.ffn_backward)
