"""Fast drop-in modules and kernels for Recurrent-Depth Transformers.

`accelerate(model)` swaps them into a model of `openmythos` or `open_mythos`, in place;
`report(model)` says what runs and why, `restore(model)` undoes it.
"""

from openmythos_kernels.swap import accelerate, report, restore

__all__ = ["accelerate", "report", "restore"]
