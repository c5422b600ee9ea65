"""Checks an extension that was built against a CUDA PyTorch; needs no GPU.

Its CUDA implementations must be registered and `info` must name their architectures. Without a driver, a request for
the CUDA backend must fail with a reason. `make cuda-build` runs this on the built package, not on the checkout.
"""

from __future__ import annotations

import sys

import torch

from openmythos_kernels.ops import loop  # noqa: F401 - the import declares the ops
from openmythos_kernels.runtime import backends, extension, info

OPS = ("loop_step", "loop_step_backward", "compact_active", "gather_rows", "scatter_rows")


def problems() -> list[str]:
    if extension.module is None:
        return [extension.reason]
    if not extension.cuda_architectures(extension.module):
        return ["the extension has no CUDA kernels"]
    found = [
        f"openmythos::{op} has no CUDA implementation"
        for op in OPS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"openmythos::{op}", "CUDA")
    ]
    if not torch.cuda.is_available():
        try:
            backends.require("loop_step", "cuda", "cuda")
            found.append("the CUDA backend does not refuse to run without a driver")
        except RuntimeError as error:
            print(f"without a driver: {error}")
        choice = backends.choose("loop_step", "cuda")
        if choice.backend == "cuda":
            found.append(f"the automatic choice without a driver is {choice}")
    return found


if __name__ == "__main__":
    print(info.describe())
    found = problems()
    for problem in found:
        print(f"WRONG: {problem}", file=sys.stderr)
    print(f"CUDA build {'FAILED' if found else 'passes'}: torch {torch.__version__}, CUDA {torch.version.cuda}")
    sys.exit(bool(found))
