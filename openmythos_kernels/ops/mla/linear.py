"""`openmythos::mla_linear`: attention's projections on a CPU, by the faster of the two libraries that PyTorch ships.

PyTorch sends float32 to MKL. Here products and the gradients of their inputs go to oneDNN where that is faster
(csrc/cpu/simd/gemm.cpp); the gradients of weights stay with MKL, as neither library is clearly faster.
"""

from __future__ import annotations

from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import KERNEL_FLOATS
from openmythos_kernels.ops.mla import formula
from openmythos_kernels.ops.op import Op


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `torch.nn.functional.linear(x, weight)`, with gradients.

    Args:
        x: (..., I), one of KERNEL_FLOATS. weight: (O, I), same dtype.

    Returns:
        (..., O) in x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    good = x.dtype in KERNEL_FLOATS and x.dim() >= 1 and weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    if not good or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"x, weight: got {x.dtype} {tuple(x.shape)} on {x.device} and {weight.dtype} {tuple(weight.shape)} on "
            f"{weight.device}, must be (..., I) and (O, I) of one dtype in {KERNEL_FLOATS}"
        )
    return mla_linear(x.contiguous(), weight.contiguous())


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[-2:]
    dx, dweight = _gradients(grad.contiguous(), x, weight, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None


def _fake_backward(grad, x, weight, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


mla_linear = Op(
    "mla_linear(Tensor x, Tensor weight) -> Tensor",
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
    formula=lambda *args: (formula.projection(*args),),
)
mla_linear_backward = Op(
    "mla_linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight) "
    "-> (Tensor x, Tensor weight)",
    fake=_fake_backward,
)
_gradients = Again(mla_linear_backward, formula.projection_backward)
