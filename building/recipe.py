"""The C++ extension's sources and compiler flags, for the PyTorch imported here.

There are always CPU kernels, and CUDA kernels if PyTorch is a CUDA build and there is an nvcc that works with it: for
TORCH_CUDA_ARCH_LIST, by default for sm_80, sm_90 and sm_100 in one file.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from building.heard import first_error

NAME = "openmythos_kernels._C"


def toolkit() -> str:
    """The folder of the CUDA toolkit of the `nvcc` on the path, which may be a link or a script; "" without nvcc."""
    if shutil.which("nvcc") is None:
        return ""
    run = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    return next((line.removeprefix("#$ TOP=") for line in run.stderr.splitlines() if line.startswith("#$ TOP=")), "")


if torch.version.cuda and toolkit():
    # Before the import, which would otherwise take the folder of a script named nvcc.
    os.environ.setdefault("CUDA_HOME", toolkit())

from torch.utils import cpp_extension  # noqa: E402 - reads CUDA_HOME
from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension  # noqa: E402

# The instruction set that PyTorch selects on this machine, so that ATen's vector types have the same width in our code
# as in PyTorch's.
CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}

# PyTorch's headers that most files include; to read them takes longer than the rest of a file.
HEADERS = """#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
"""


class BuildExtension(cpp_extension.BuildExtension):
    """On Linux, compiles PyTorch's headers first, once for all files."""

    def build_extension(self, ext):
        # Few files gain nothing. On macOS, Python may compile for two architectures at once, which excludes it.
        if platform.system() == "Linux" and len(ext.sources) >= 8:
            header = Path(self.build_temp).resolve() / "torch_headers.hpp"
            header.parent.mkdir(parents=True, exist_ok=True)
            if not header.exists() or header.read_text() != HEADERS:  # its time decides what is compiled again
                header.write_text(HEADERS)
            if ".hpp" not in self.compiler.src_extensions:
                self.compiler.src_extensions.append(".hpp")
            flags = {name: list(values) for name, values in ext.extra_compile_args.items()}
            [made] = self.compiler.compile(
                [str(header)], str(header.parent), ext.define_macros, ext.include_dirs, extra_postargs=flags
            )
            precompiled = header.with_name(f"{header.name}.gch")
            precompiled.unlink(missing_ok=True)
            precompiled.symlink_to(Path(made).resolve())
            ext.extra_compile_args["cxx"] += ["-include", str(header)]
        super().build_extension(ext)


def capability() -> str:
    """The vector width to build for, by PyTorch's name."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in CAPABILITY_FLAGS else "DEFAULT"  # NEON and others need no flag


def nvcc() -> str:
    """The CUDA compiler, or "" if no CUDA kernels are built."""
    return "" if without_cuda() else _nvcc()


@functools.cache
def without_cuda() -> str:
    """Why no CUDA kernels are built, from a test of seconds; "" if they are. A fault of the CUDA toolkit must not cost
    the CPU kernels, which are compiled in one piece with its own."""
    if not torch.version.cuda or torch.version.hip:
        return "this PyTorch is no CUDA build"
    compiler = _nvcc()
    if not compiler:
        return "nvcc was not found (set CUDA_HOME)"
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    if release and release[1] != torch.version.cuda.split(".")[0]:
        return f"{compiler} is of CUDA {release[1]}, this PyTorch of CUDA {torch.version.cuda}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime_api.h>\n#include <vector>\n")
        host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as PyTorch calls it
        command = [compiler, *host, "-std=c++17", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        english = {**os.environ, "LC_ALL": "C"}  # in which first_error reads
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", env=english)
    lines = run.stderr.splitlines() or [f"status {run.returncode}"]
    return f"{compiler} compiles nothing: {first_error(lines) or lines[-1]}" if run.returncode else ""


def _nvcc() -> str:
    return shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) or "" if CUDA_HOME else ""


def cuda_architectures(compiler: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or those of sm_80, sm_90 and sm_100 that this nvcc knows, the last with PTX."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in ("8.0", "9.0", "10.0") if f"compute_{name.replace('.', '')}" in known]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"  # read by BuildExtension
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extension() -> CppExtension:
    """The extension, with paths relative to the folder of csrc, in which setuptools runs."""
    width = capability()
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-Wno-sign-compare"]  # PyTorch's headers warn once they are precompiled
    # A compiler may make two versions of a loop, and choose by the addresses of its arrays. With contraction one rounds
    # a product before it is added and the other does not, so a bit would depend on addresses. Vector code asks for
    # fused multiply-adds where it wants them.
    flags += ["-ffp-contract=off", *CAPABILITY_FLAGS.get(width, [])]
    flags += [f"-DCPU_CAPABILITY={width}", f"-DCPU_CAPABILITY_{width}"]
    # Apple's clang has no OpenMP: parallel loops then run on one thread.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").rglob("*.cpp")))]
    compiler = nvcc()
    if compiler:
        sources += sorted(map(str, [*Path("csrc/cuda").rglob("bindings*.cpp"), *Path("csrc/cuda").rglob("*.cu")]))
        architectures = cuda_architectures(compiler).replace(" ", ";")
        flags += [f'-DOPENMYTHOS_CUDA_ARCHITECTURES="{architectures}"']
    elif torch.version.cuda:
        warnings.warn(f"openmythos_kernels: no CUDA kernels are built, as {without_cuda()}", stacklevel=1)
    return (CUDAExtension if compiler else CppExtension)(
        NAME,
        sources=sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": flags + openmp, "nvcc": ["-O3", "-std=c++17"]},
        extra_link_args=openmp,
    )
