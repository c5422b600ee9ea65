"""Builds the optional C++ extension `openmythos_kernels._C`.

Without a working compiler the packages still install: every module then runs
on the PyTorch reference and `python -m openmythos_kernels info` says why.
Metadata lives in pyproject.toml.
"""

import platform
import sys
import warnings
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# Instruction sets follow what PyTorch itself selects on this machine, so that
# ATen's vector types have the same width in our code as in PyTorch's.
CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def cpu_extension() -> CppExtension:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITY_FLAGS:
        capability = "DEFAULT"  # NEON and others need no flag
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"]
    flags += CAPABILITY_FLAGS.get(capability, [])
    flags += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    # Apple's clang has no OpenMP: parallel loops then run on one thread.
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    return CppExtension(
        "openmythos_kernels._C",
        sources=["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=flags + openmp,
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


setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": OptionalBuild})
