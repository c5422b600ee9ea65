"""Builds the packages and, where PyTorch and a C++ compiler are there, the extension `openmythos_kernels._C`.

Without them the packages still install: every module then runs on the PyTorch reference,
and `python -m openmythos_kernels info` says why. Metadata lives in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from building.extension import OptionalBuild, declared
from building.wheel import Wheel, WithSources

setup(ext_modules=[declared()], cmdclass={"build_ext": OptionalBuild, "build_py": WithSources, "bdist_wheel": Wheel})
