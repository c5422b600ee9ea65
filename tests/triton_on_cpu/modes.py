"""The two ways to run Triton kernels without a GPU, each in a process that runs nothing else.

interpreter   Triton's own (TRITON_INTERPRET=1): the kernel's Python on numpy, in float32 and float16, and in bfloat16
              where no matrices are multiplied: its `tl.dot` takes bfloat16's bit patterns for numbers. Every access
              is checked and counted by `openmythos_kernels.verify.traffic`.
ptxsim        what Triton generates for sm_80, executed instruction by instruction: tensor-core dots, asynchronous
              copies, shuffles, in bfloat16, float16 and float32. It checks bounds, alignment, barriers, missing waits
              and races in shared memory, and lives in a folder of its own (`pytest --ptxsim FOLDER`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from openmythos_kernels.ops.op import Op
from openmythos_kernels.verify.specification import Specification

_DTYPES = {
    "interpreter": (torch.float32, torch.float16, torch.bfloat16),
    "ptxsim": (torch.bfloat16, torch.float16, torch.float32),
}
MODES = tuple(_DTYPES)
_VARIABLE = "TRITON_ON_CPU"


def dtypes(mode: str, specification: Specification) -> list[torch.dtype]:
    """Those of an op that a mode can execute, the most telling first."""
    without = {torch.bfloat16} if mode == "interpreter" and specification.matrix else set()
    return [dtype for dtype in _DTYPES[mode] if dtype in specification.dtypes and dtype not in without]


def current() -> str:
    """This process's mode; empty in one that runs everything else."""
    return os.environ.get(_VARIABLE, "")


def environment(mode: str) -> dict[str, str]:
    """What a process in this mode needs from its first line on, as Triton decides when it is imported.

    One thread: its tensors are small, and threads that wait for one another cost more than all else.
    """
    return {
        **os.environ,
        _VARIABLE: mode,
        "TRITON_INTERPRET": "1" if mode == "interpreter" else "0",
        "OMP_NUM_THREADS": "1",
    }


def missing(mode: str, ptxsim: Path) -> str:
    """Why a mode cannot run here; empty when it can."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if mode == "ptxsim" and not (ptxsim / "tritonsim.py").exists():
        return f"ptxsim is not in {ptxsim}; pytest --ptxsim FOLDER says where"
    return ""


@contextlib.contextmanager
def entered(mode: str, ptxsim: Path) -> Iterator[None]:
    """Kernels launched within run on CPU tensors, watched."""
    if mode == "interpreter":
        from triton.runtime import interpreter

        from openmythos_kernels.verify.traffic import traffic

        with traffic() as launches:
            seen = set()

            def device_function(self, *args, **options):
                """As the original, which patches Triton's language at every call (a third of all time): once a
                launch."""
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

    with tritonsim.on_cpu(), mock.patch.object(Op, "launch", _with_lists_in_one_piece(Op.launch)):
        yield


def not_checked(error: BaseException) -> bool:
    """Whether ptxsim says that it cannot execute this; all its other errors are faults of the kernel."""
    return type(error).__name__ == "PtxError" and "unsupported" in str(error)


def _with_lists_in_one_piece(launch):
    """Kernels find the tensors of a list by their distance from the first: ptxsim knows those of one storage only."""

    def piled(arg):
        if not isinstance(arg, (list, tuple)) or len({x.untyped_storage().data_ptr() for x in arg}) < 2:
            return arg  # one storage already, and maybe written to
        return list(torch.stack(list(arg)).unbind())

    return lambda self, *args: launch(self, *map(piled, args))
