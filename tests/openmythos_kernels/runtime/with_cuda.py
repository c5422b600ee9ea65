"""Run as a program: which backend each op's kernel for GPU tensors is, where the extension has CUDA kernels.

Extension, GPU and kernels are stand-ins; a kernel tells its backend. All are there before the package is imported, as
ops look for the extension's kernels when they are declared. Prints a line per op with a GPU backend: its name, what the
dispatcher runs, what eager calls run.
"""

import importlib
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

COMPILED = ("loop_step", "loop_step_backward", "compact_active", "gather_rows", "scatter_rows")
EXTENSION = "openmythos_kernels._C"


class Ran(Exception):
    pass


def kernel(*_):
    raise Ran("cuda")


def launch(*_):
    raise Ran("triton")


def argument(kind):
    """A value that fits a schema's type."""
    name = str(kind)
    if name.startswith("Optional"):
        return None
    if name.startswith("List"):
        return [torch.zeros(1)]
    return {"Tensor": torch.zeros(1), "int": 1, "float": 1.0, "bool": True}[name]


def ran(call) -> str:
    try:
        call()
    except Ran as backend:
        return str(backend)
    return "none"


def stand_in():
    """An extension built for the GPU at hand."""
    module = ModuleType(EXTENSION)
    module.__spec__ = ModuleSpec(EXTENSION, None)
    module.torch_version, module.cpu_capability, module.cuda_architectures = torch.__version__, "DEFAULT", "9.0"
    sys.modules[EXTENSION] = module
    torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *_: (9, 0)
    library = torch.library.Library("openmythos", "IMPL")
    for name in COMPILED:
        library.impl(name, kernel, "CUDA")
    return library


def main():
    library = stand_in()
    from openmythos.compat import redispatch_to_cuda, schema_of
    from openmythos_kernels import ops
    from openmythos_kernels.ops.op import Op
    from openmythos_kernels.runtime import backends

    assert {name for name, row in backends.OPS.items() if "cuda" in row} == set(COMPILED)
    Op.launch = launch
    found = {}
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if ".kernels" not in module.name and ".launch" not in module.name:
            values = vars(importlib.import_module(module.name)).values()
            found |= {value.name: value for value in values if isinstance(value, Op)}
    for name, row in backends.OPS.items():
        if {"cuda", "triton"} & set(row):
            op = found[name]
            args = [argument(a.type) for a in schema_of(op.overload).arguments]
            dispatched = ran(lambda op=op, args=args: redispatch_to_cuda(op.overload, *args))
            eager = ran(lambda op=op, args=args: op._on_gpu(*args)) if op._launches else dispatched
            print(name, dispatched, eager)
    del library  # it held the registrations


if __name__ == "__main__":
    main()
