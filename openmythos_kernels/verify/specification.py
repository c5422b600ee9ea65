"""What an op says of itself once, so that every check can be run on it.

Tests, `python -m openmythos_kernels verify`, `compile` and the benchmarks' byte
counts all read these; they stand in `openmythos_kernels.verify.specs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # as the command line names them

Sizes = Mapping[str, Any]  # "tokens" -> 37, "halting" -> "all at once", ...
Inputs = dict[str, Any]  # argument -> Tensor, list of Tensors, number
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Specification:
    """One public op of a family.

    Attributes:
        name: the op's, as in `torch.ops.openmythos.<name>`.
        backends: those that have an implementation ("cpu", "triton", "cuda").
        make: `(sizes, dtype, device, generator) -> inputs`. Every floating input must be exactly representable in
            dtype. Must also work for device "meta" (generator None): then only shapes and dtypes count.
        fast: `(**inputs) -> outputs`: the public op, on whichever backend runs or is forced.
        reference: `(**inputs) -> outputs`: the same in eager PyTorch, by the modules and functions of `openmythos`,
            in any dtype; called in float64 it is the truth.
        differentiable: names of the inputs that have gradients (a list of tensors counts as one name).
        exact: outputs that must equal the reference's bit for bit (indices, counts, flags).
        cases: name -> sizes: small and adversarial shapes of rung 4; each is run in every test mode.
        ranges: size -> (least, most): what random shapes are drawn from, the other sizes taken from the first case.
        shipped: name -> sizes: the shapes users run (published variants), for ahead-of-time compilation and byte
            counts.
        dtypes: that the op takes.
        matrix: whether its Triton kernels multiply matrices, so that matrix instructions must appear in them.
        chained: whether the op's steps feed one another, as loops do, so that eager's error in one run is a matter of
            luck in the first rounding: the budget is then that of the worst of several eager runs, whose inputs are one
            rounding apart.
        hostile: `(inputs) -> inputs`: the same, copied, with NaN and wild indices wherever the op must not look. The
            fast op is called with these; None where it looks at everything.
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
    """`draw(*shape, scale=1.0, as_dtype=dtype)`: normal numbers that dtype represents exactly; on meta only the
    shape."""

    def draw(*shape: int, scale: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        if generator is None:
            return torch.empty(shape, dtype=as_dtype, device=device)
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).to(as_dtype)

    return draw
