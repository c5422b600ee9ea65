"""`openmythos::swiglu_ffn`: a dense SwiGLU feed-forward layer for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos_kernels.ops.moe.experts import DTYPES
from openmythos_kernels.ops.op import Op

# With more tokens each weight is used often enough for library GEMMs, called as the reference calls them.
MOST_TOKENS = 16


def swiglu_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`down(silu(gate x) * up x)`, every weight read once. Inference only: nothing here has a gradient.

    Args:
        x: (N, D), one of DTYPES, N <= MOST_TOKENS.
        gate, up: (I, D); down: (D, I); all in x's dtype.

    Returns:
        (N, D) in x's dtype. Sums are taken in float32 (float64 for float64).

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or x.shape[0] > MOST_TOKENS:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, must be (N <= {MOST_TOKENS}, D) in one of {DTYPES}")
    inner, dim = gate.shape[0], x.shape[1]
    for name, weight, shape in (("gate", gate, (inner, dim)), ("up", up, (inner, dim)), ("down", down, (dim, inner))):
        if weight.shape != shape or weight.dtype != x.dtype:
            raise ValueError(f"{name}: got {weight.dtype} {tuple(weight.shape)}, must be {x.dtype} {shape}")
    return SWIGLU_FFN(x.contiguous(), gate.contiguous(), up.contiguous(), down.contiguous())


SWIGLU_FFN = Op(
    "swiglu_ffn(Tensor x, Tensor gate, Tensor up, Tensor down) -> Tensor",
    fake=lambda x, gate, up, down: torch.empty_like(x),
)
