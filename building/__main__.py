"""`python -m building FOLDER`, in the folder that holds csrc: the extension alone, below FOLDER.
`openmythos_kernels.build()` runs it."""

import sys
from pathlib import Path

from setuptools import setup

from building.extension import OptionalBuild, declared

setup(
    name="openmythos-kernels",
    ext_modules=[declared()],
    cmdclass={"build_ext": OptionalBuild},
    script_args=["build_ext", "--build-lib", sys.argv[1], "--build-temp", str(Path(sys.argv[1], "objects").resolve())],
)
