"""`python -m building FOLDER`: builds the extension alone, below FOLDER; run it beside csrc.

`openmythos_kernels.build()` does so.
"""

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
