"""Loads the public `open-mythos` package, which everything here is compared with."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType

NAME = "open_mythos.main"


def load_upstream() -> ModuleType:
    """`open_mythos/main.py` of the installed distribution, as module `open_mythos.main`.

    The file is loaded by its path, since the package's own `__init__` imports
    `transformers`, which the model does not need.

    Raises:
        ImportError: the distribution is not installed, or its file does not load.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        path = distribution("open-mythos").locate_file("open_mythos/main.py")
    except PackageNotFoundError:
        raise ImportError("open-mythos is not installed (pip install --no-deps open-mythos==0.5.0)") from None
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # dataclasses look their module up while it loads
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[NAME]
        raise ImportError(f"{path} does not load: {error}") from error
    return module


def upstream_version() -> str:
    try:
        return distribution("open-mythos").version
    except PackageNotFoundError:
        return "not installed"
