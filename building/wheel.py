"""The contents of a wheel, and its name."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCES = "_source"  # in the package
_PATTERNS = ("building/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cuh")


class WithSources(build_py):
    """Copies the C++ sources into the package, for `openmythos_kernels.build()`; a checkout has them beside it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "openmythos_kernels", SOURCES)
        shutil.rmtree(folder, ignore_errors=True)  # files of an earlier build
        for path in (path for pattern in _PATTERNS for path in Path().glob(pattern)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path)


class Wheel(bdist_wheel):
    """A wheel whose name says whether it has the extension, as pip shows only the name of a build.

    A wheel without the extension is for any Python and platform.
    """

    def run(self):
        self.run_command("build")  # first, as the name depends on its result
        self.skip_build = True
        if self.distribution.ext_modules:
            import torch

            self.build_number = f"1_cpp_extension_for_torch_{torch.__version__.partition('+')[0]}"
        else:
            self.build_number = "0_without_cpp_extension"
            self.root_is_pure = True
        super().run()
