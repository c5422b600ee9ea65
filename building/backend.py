"""The build backend that pyproject.toml names: setuptools, with the PyTorch of the environment that pip installs into.

Build isolation hides that environment, and a build requirement would fetch another PyTorch to compile against. So the
environment's Python, which runs this file, says where its PyTorch is. Without a PyTorch the package is built as pure
Python, and `openmythos_kernels.build()` compiles the extension later.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - hooks that pip calls
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_FOLDERS = """
import importlib.util, sys
sys.path[:] = filter(None, sys.path)  # without the current folder
print("\\n".join(sys.path) if importlib.util.find_spec("torch") else "")
"""
_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")  # by these pip hides the environment


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def get_requires_for_build_wheel(config_settings=None):
    """ninja, which compiles several files at a time, if the extension will be compiled."""
    return ["ninja"] if show_torch() and shutil.which("ninja") is None else []


get_requires_for_build_editable = get_requires_for_build_wheel


def show_torch() -> bool:
    """Appends the environment's PyTorch to the import path; True if there is one."""
    if importlib.util.find_spec("torch"):
        return True
    environment = {name: value for name, value in os.environ.items() if name not in _ISOLATION}
    run = subprocess.run([sys.executable, "-c", _FOLDERS], env=environment, capture_output=True, text=True)
    folders = run.stdout.splitlines() if run.returncode == 0 else []
    sys.path += [folder for folder in folders if folder and folder not in sys.path]
    importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None
