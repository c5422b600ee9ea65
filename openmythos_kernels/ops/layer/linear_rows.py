"""`openmythos::linear_rows`: a linear layer whose rows do not depend on one another, to the bit."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from openmythos_kernels.ops.op import Op
from openmythos_kernels.runtime.backends import choose


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear(x, weight)` for few rows.

    Without gradients. On a CPU no bit of a row depends on the other rows or on the number of threads; a library's
    product chooses its order of summation by its size.

    Args:
        x: (N, D), one of `ops.dtypes.FLOATS`. weight: (V, D), same dtype.

    Returns:
        (N, V) in x's dtype.

    Raises:
        ValueError: an argument's shape or dtype is not as above.
    """
    if not choose("linear_rows", x.device.type).fast:
        return F.linear(x, weight)
    return LINEAR_ROWS(x.contiguous(), weight.contiguous())


LINEAR_ROWS = Op(
    "linear_rows(Tensor x, Tensor weight) -> Tensor", fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0])
)
