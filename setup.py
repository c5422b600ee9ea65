"""Builds the optional C++ extension `openmythos_kernels._C`.

One build: CPU kernels always, CUDA kernels too where PyTorch is a CUDA build and nvcc is there
(TORCH_CUDA_ARCH_LIST is honoured; by default all of sm_80 to sm_100 in one file).
Without a working compiler the packages still install: every module then runs
on the PyTorch reference and `python -m openmythos_kernels info` says why.
Metadata lives in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from setuptools import setup


def toolkit() -> str:
    """The folder of the CUDA toolkit that `nvcc` on the path belongs to, be it a link or a script; "" without one."""
    if shutil.which("nvcc") is None:
        return ""
    run = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    return next((line.removeprefix("#$ TOP=") for line in run.stderr.splitlines() if line.startswith("#$ TOP=")), "")


if torch.version.cuda and toolkit():
    os.environ.setdefault("CUDA_HOME", toolkit())  # the next import looks for it, and takes a script's folder for it

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Instruction sets follow what PyTorch itself selects on this machine, so that
# ATen's vector types have the same width in our code as in PyTorch's.
CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def nvcc() -> str:
    """The compiler of a CUDA build of PyTorch, or "" where there are to be no CUDA kernels."""
    if not torch.version.cuda or torch.version.hip or CUDA_HOME is None:
        return ""
    return shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) or ""


def cuda_architectures(compiler: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or what this nvcc knows of sm_80, sm_90 and sm_100, the last as PTX too."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in ("8.0", "9.0", "10.0") if f"compute_{name.replace('.', '')}" in known]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"  # read by BuildExtension
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extension() -> CppExtension:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITY_FLAGS:
        capability = "DEFAULT"  # NEON and others need no flag
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
    flags += CAPABILITY_FLAGS.get(capability, [])
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    # Apple's clang has no OpenMP: parallel loops then run on one thread.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    compiler = nvcc()
    if compiler:
        sources += sorted(map(str, [*Path("csrc/cuda").glob("bindings*.cpp"), *Path("csrc/cuda").glob("*.cu")]))
        architectures = cuda_architectures(compiler).replace(" ", ";")
        flags += [f'-DOPENMYTHOS_CUDA_ARCHITECTURES="{architectures}"']
    elif torch.version.cuda:
        warnings.warn("openmythos_kernels: nvcc was not found (set CUDA_HOME); there will be no CUDA kernels", stacklevel=1)
    return (CUDAExtension if compiler else CppExtension)(
        "openmythos_kernels._C",
        sources=sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": flags + openmp, "nvcc": ["-O3", "-std=c++17"]},
        extra_link_args=openmp,
        optional=True,
    )


class OptionalBuild(BuildExtension):
    """A failed compilation is a loud warning, not a failed installation."""

    def run(self):
        try:
            super().run()
        except Exception as error:  # compilers fail in many ways: missing, too old, out of memory
            warnings.warn(
                "\n\n*** openmythos_kernels: the C++ extension was NOT built; everything will run on the "
                f"slower PyTorch reference.\n*** reason: {error}\n",
                stacklevel=1,
            )
            print("openmythos_kernels: installed WITHOUT the C++ extension", file=sys.stderr)


setup(ext_modules=[extension()], cmdclass={"build_ext": OptionalBuild})
