"""The specification of an op: inputs, the fast call, the reference, and the cases to check.

Tests, `python -m openmythos_kernels verify`, `compile` and the benchmarks' byte counts read the specifications in
`openmythos_kernels.verify.specs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their names on the command line

Sizes = Mapping[str, Any]  # "tokens" -> 37, "halting" -> "all at once", ...
Inputs = dict[str, Any]  # argument -> Tensor, list of Tensors, number
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Specification:
    """One public op.

    Attributes:
        name: the op's in `torch.ops.openmythos`.
        backends: those that implement it ("cpu", "triton", "cuda").
        make: `(sizes, dtype, device, generator) -> inputs`. Floating inputs must be exactly representable in dtype. On
            the device "meta" the generator is None, and only shapes and dtypes matter.
        fast: `(**inputs) -> outputs`: the public op, on the backend that is chosen or forced.
        reference: `(**inputs) -> outputs`: the same in eager PyTorch, by the modules and functions of `openmythos`, in
            any dtype; in float64 it is the truth.
        differentiable: names of the inputs that have gradients (a list of tensors counts as one name).
        exact: outputs that must equal the reference's bit for bit (indices, counts, flags).
        cases: name -> sizes: small and adversarial shapes; each runs in every test mode.
        ranges: size -> (least, most), for random shapes; the other sizes come from the first case.
        shipped: name -> sizes: the shapes that users run (published variants), for ahead-of-time compilation and byte
            counts.
        dtypes: those that the op takes.
        matrix: True if its Triton kernels multiply matrices and so must contain matrix instructions.
        chained: True if the op's steps feed one another, as loops do. Eager's error in one run then depends on the
            luck of the first rounding, and the budget is that of the worst of several eager runs whose inputs are one
            rounding apart.
        hostile: `(inputs) -> inputs`: a copy with NaN and wild indices wherever the op must not read; the fast op is
            called with it. None if the op reads everything.
    """

    name: str
    backends: tuple[str, ...]
    make: Callable[[Sizes, torch.dtype, torch.device, torch.Generator | None], Inputs]
    fast: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    differentiable: tuple[str, ...]
    cases: Mapping[str, Sizes]
    ranges: Mapping[str, tuple[int, int]]
    shipped: Mapping[str, Sizes] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    matrix: bool = False
    chained: bool = False
    hostile: Callable[[Inputs], Inputs] | None = None

    def __str__(self) -> str:
        return self.name


def drawer(dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Callable[..., Tensor]:
    """`draw(*shape, scale=1.0, as_dtype=dtype)`: normal numbers that dtype represents exactly; uninitialized without a
    generator."""

    def draw(*shape: int, scale: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        if generator is None:
            return torch.empty(shape, dtype=as_dtype, device=device)
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).to(as_dtype)

    return draw
