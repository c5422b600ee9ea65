"""Records the launches of an op by running it on meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from openmythos_kernels.runtime import backends
from openmythos_kernels.runtime.target import Target, targeting
from openmythos_kernels.verify.check import with_leaves
from openmythos_kernels.verify.specification import Specification

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Launch:
    """One launch as the compiler sees it.

    Attributes:
        kernel: the jitted function. signature, constants, hints: the arguments of `triton.compiler.ASTSource`.
        options: num_warps, num_stages and so on.
    """

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    hints: dict[tuple[int], list]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.hints)

    def configuration(self) -> str:
        """The constants and options that tell this launch from others of its kernel, as text."""
        names = self.kernel.arg_names
        fixed = [f"{names[i]}={value}" for (i,), value in self.constants.items() if names[i].isupper()]
        return " ".join(fixed + [f"{name}={value}" for name, value in sorted(self.options.items())])


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the context, kernels are not launched; yields the list of their launches."""
    launches: list[Launch] = []
    launch = JITFunction.run

    def record(self, *args, grid, warmup, **named):
        launches.append(_launch(self, args, named))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = launch


def _launch(kernel: JITFunction, args: tuple, named: dict[str, Any]) -> Launch:
    """Specializes as Triton does: constants, None and the number 1 are compiled in, multiples of 16 are a hint."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in named.items() if k in kernel.arg_names}
    options = {k: v for k, v in named.items() if k not in kernel.arg_names}
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, name = values[parameter.name], parameter.name
        aligned = [["tt.divisibility", 16]]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], hints[(i,)] = "*" + _TYPES[value.dtype], aligned
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[name], constants[(i,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[(i,)] = aligned
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constants, hints, options)


def launches(specification: Specification, sizes, dtype: torch.dtype, target: Target) -> list[Launch]:
    """The launches of the op, and of its backward if it has one, for these sizes on this target."""
    made = specification.make(sizes, dtype, torch.device("meta"), None)
    inputs, leaves = with_leaves(made, specification.differentiable)
    with targeting(target), backends.forcing("triton"), recording() as found:
        if leaves:  # without gradients the op may launch other kernels
            with torch.no_grad():
                specification.fast(**inputs)
        ends = [out for out in specification.fast(**inputs).values() if out.requires_grad]
        if ends:
            torch.autograd.grad(ends, list(leaves.values()), [torch.empty_like(out) for out in ends], allow_unused=True)
    return found
