"""Fast drop-in modules and kernels for Recurrent-Depth Transformers.

`accelerate(model)` swaps them into a model of `openmythos` or `open_mythos`, in place;
`report(model)` says what runs and why, `restore(model)` undoes it.
`graphed_step(model, loss)` makes forward and backward of a training step one launch on a GPU.
`use_huge_pages(tensors)` is what `accelerate` does with weights on a CPU, for weights that moved since.
`build()` compiles the C++ extension where the installation could not; `OPENMYTHOS_BUILD=1` does it at the first import.
"""

from openmythos_kernels.graphed_step import graphed_step
from openmythos_kernels.report import report
from openmythos_kernels.runtime.extension import build
from openmythos_kernels.runtime.huge_pages import use_huge_pages
from openmythos_kernels.swap import accelerate, restore

__all__ = ["accelerate", "build", "graphed_step", "report", "restore", "use_huge_pages"]
