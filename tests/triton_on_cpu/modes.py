"""The two modes that run Triton kernels without a GPU, each in processes of its own.

interpreter   Triton's interpreter (TRITON_INTERPRET=1) executes the kernel's Python on numpy arrays, in float32 and
              float16. bfloat16 works only without matrix products, since its `tl.dot` reads the bits of bfloat16 as
              integers. `openmythos_kernels.verify.traffic` checks and counts every access.
ptxsim        executes, instruction by instruction, the PTX that Triton generates for sm_80: tensor-core dots,
              asynchronous copies and shuffles, in bfloat16, float16 and float32. It checks bounds, alignment, barriers,
              missing waits and races in shared memory. It is a separate program (`pytest --ptxsim FOLDER`).

Only functions of this file import PyTorch: the plugin, which every pytest process loads, needs none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    import torch

    from openmythos_kernels.verify.specification import Specification

_DTYPES = {"interpreter": ("float32", "float16", "bfloat16"), "ptxsim": ("bfloat16", "float16", "float32")}
MODES = tuple(_DTYPES)
_VARIABLE = "TRITON_ON_CPU"


def dtypes(mode: str, specification: Specification) -> list[torch.dtype]:
    """The dtypes of an op that a mode can execute; the first one shows most."""
    import torch

    names = [
        name for name in _DTYPES[mode] if not (specification.matrix and (mode, name) == ("interpreter", "bfloat16"))
    ]
    return [dtype for dtype in (getattr(torch, name) for name in names) if dtype in specification.dtypes]


def current() -> str:
    """The mode of this process; "" in a process that runs everything else."""
    return os.environ.get(_VARIABLE, "")


def environment(mode: str) -> dict[str, str]:
    """The environment of a process in this mode, which must be set at its start: Triton reads it at import.

    With one thread, since its tensors are small, and synchronizing threads would take most of the time.
    """
    return {
        **os.environ,
        _VARIABLE: mode,
        "TRITON_INTERPRET": "1" if mode == "interpreter" else "0",
        "OMP_NUM_THREADS": "1",
    }


def missing(mode: str, ptxsim: Path) -> str:
    """Why a mode cannot run here; "" if it can."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if mode == "ptxsim" and not (ptxsim / "tritonsim.py").exists():
        return f"ptxsim is not in {ptxsim}; pytest --ptxsim FOLDER says where"
    return ""


@contextlib.contextmanager
def entered(mode: str, ptxsim: Path) -> Iterator[None]:
    """Within, kernels run on CPU tensors, with the checks of the mode."""
    if mode == "interpreter":
        from triton.runtime import interpreter

        from openmythos_kernels.verify.traffic import traffic

        with traffic() as launches:
            seen = set()

            def device_function(self, *args, **options):
                """As the original, but patches Triton's language per launch: doing so per call takes a third of all
                time."""
                key = len(launches), id(self.fn.__globals__)
                if key not in seen:
                    seen.add(key)
                    interpreter._patch_lang(self.fn)
                return self.rewrite()(*args, **options)

            with mock.patch.object(interpreter.InterpretedFunction, "__call__", device_function):
                yield
        return
    if str(ptxsim) not in sys.path:
        sys.path.insert(0, str(ptxsim))
    import tritonsim

    from openmythos_kernels.ops.op import Op

    with tritonsim.on_cpu(), mock.patch.object(Op, "launch", _with_lists_in_one_piece(Op.launch)):
        yield


def not_checked(error: BaseException) -> bool:
    """Whether ptxsim says that it does not support something; all its other errors are faults of the kernel."""
    return type(error).__name__ == "PtxError" and "unsupported" in str(error)


def _with_lists_in_one_piece(launch):
    """Kernels address equal matrices of a list relative to the first; ptxsim requires that they share one storage."""
    import torch

    def piled(arg):
        if not isinstance(arg, (list, tuple)) or not all(isinstance(x, torch.Tensor) for x in arg):
            return arg
        if len({x.shape for x in arg}) != 1 or arg[0].dim() != 2:
            return arg  # each has an address of its own
        if len({x.untyped_storage().data_ptr() for x in arg}) < 2:
            return arg  # already one storage; not copied, since the kernel may write to it
        return list(torch.stack(list(arg)).unbind())

    return lambda self, *args: launch(self, *map(piled, args))
