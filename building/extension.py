"""The command that compiles the extension, or leaves it out and records why.

Beside the extension, or where it would be, is `_build.json`: {"reason": why it was not built, or "", "torch": version,
"capability": vector width, "cuda": architectures of its CUDA kernels, or "", "without_cuda": why it has none, or ""}.
The package reads it before it loads the extension.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension

from building.heard import first_error, heard

NAME = "openmythos_kernels._C"
RECORD = "_build.json"
OLDEST_TORCH = (2, 9)  # as in pyproject.toml
_PROBE = """#include <Python.h>
#include <concepts>
#include <version>
template <std::integral T> T same(T x) { return x; }
"""


def _without_torch() -> str:
    """Why there is no PyTorch to compile against; empty if there is one."""
    try:
        import torch
    except ModuleNotFoundError as error:
        missing = "there was no PyTorch" if error.name == "torch" else f"PyTorch could not be imported ({error})"
        return f"{missing} in the environment that it was built in"
    except Exception as error:  # a PyTorch whose libraries do not load
        return f"PyTorch could not be imported ({type(error).__name__}: {error})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} was there, torch >= {'.'.join(map(str, OLDEST_TORCH))} is needed"
    return ""


if WITHOUT_TORCH := _without_torch():
    from setuptools.command.build_ext import build_ext as _Build

    def declared() -> Extension:
        """An extension without sources, so that setuptools runs the command that records why there is none."""
        return Extension(NAME, sources=[])
else:
    import torch

    from building.recipe import BuildExtension as _Build
    from building.recipe import capability, cuda_architectures, nvcc, without_cuda
    from building.recipe import extension as declared  # noqa: F401 - setup.py imports it


class OptionalBuild(_Build):
    """A failed compilation prints a warning and leaves a record; the installation goes on."""

    def run(self):
        os.environ["LC_ALL"] = "C"  # first_error looks for English messages
        reason = WITHOUT_TORCH or _compiler_is_wrong()
        if not reason:
            lines: list[str] = []
            try:
                with heard(lines):
                    super().run()
            except Exception as error:  # compilers fail in many ways: too old, out of memory
                reason = first_error(lines) or " ".join(f"{type(error).__name__}: {error}".split())[:300]
        target = Path(self.get_ext_fullpath(NAME))
        if reason:
            # An extension built earlier, for other sources or another PyTorch, must not be taken for this one.
            for path in (target, Path(self.build_lib, self.get_ext_filename(NAME))):
                path.unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []  # setuptools goes on as for pure Python
            print(
                "*** openmythos_kernels: the C++ extension was NOT built; everything will run on the slower PyTorch "
                f"reference.\n*** reason: {reason}",
                file=sys.stderr,
            )
        else:
            print(f"openmythos_kernels: the C++ extension was built for torch {torch.__version__}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(RECORD).write_text(json.dumps({"reason": reason, **({} if reason else _made_for())}) + "\n")


def _made_for() -> dict:
    return {
        "torch": torch.__version__,
        "capability": capability(),
        "cuda": cuda_architectures(nvcc()) if nvcc() else "",
        "without_cuda": without_cuda(),
    }


def _compiler_is_wrong() -> str:
    """Why the C++ compiler cannot be used, from a test of a second; empty if it can."""
    compiler = os.environ.get("CXX") or "c++"
    command = [
        *shlex.split(compiler),
        "-std=c++20",
        "-fsyntax-only",
        f"-I{sysconfig.get_paths()['include']}",
        "-x",
        "c++",
        "-",
    ]
    try:
        run = subprocess.run(command, input=_PROBE, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"there is no C++ compiler that runs ({compiler}: {error.strerror}); CXX may name one"
    if run.returncode == 0:
        return ""
    lines = run.stderr.splitlines()
    return (
        f"the C++ compiler {compiler} compiles no C++20 for this Python: {first_error(lines) or ' '.join(lines[-1:])}"
    )
