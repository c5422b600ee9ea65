"""`f @ down^T` for a LoRA's down-projection of few rows, on a CPU; on GPUs the library does it well."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.derivatives import Again
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.op import Op


def loop_down(f: Tensor, down: Tensor) -> Tensor:
    """As `torch.nn.functional.linear(f, down)`.

    Args:
        f: (..., D) in one of FLOATS. down: (rank, D), same dtype; rank is small.

    Returns:
        (..., rank); sums are float32 (float64 for float64).

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    good = f.dtype in FLOATS and f.dim() >= 1 and down.dim() == 2 and down.shape[1] == f.shape[-1]
    if not good or down.dtype != f.dtype or down.device != f.device:
        raise ValueError(
            f"f, down: got {f.dtype} {tuple(f.shape)} on {f.device} and {down.dtype} {tuple(down.shape)} on "
            f"{down.device}, expected (..., D) and (rank, D) of one dtype in {FLOATS}"
        )
    return LOOP_DOWN(f.contiguous(), down.contiguous())


def _fake(f, down):
    return f.new_empty(*f.shape[:-1], down.shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _gradients(grad.contiguous(), *ctx.saved_tensors)


def _fake_backward(grad, f, down):
    return torch.empty_like(f), torch.empty_like(down)


LOOP_DOWN = Op(
    "loop_down(Tensor f, Tensor down) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    formula=lambda *args: (formula.down(*args),),
)
LOOP_DOWN_BACKWARD = Op(
    "loop_down_backward(Tensor grad, Tensor f, Tensor down) -> (Tensor df, Tensor ddown)", fake=_fake_backward
)
_gradients = Again(LOOP_DOWN_BACKWARD, formula.down_backward)
