"""Loads the public `open-mythos` package, the baseline of every benchmark and the counterpart in many tests."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType

NAME = "open_mythos_upstream"  # a name without a dot: to unpickle, Python must not import the parent package


def load_upstream() -> ModuleType:
    """`open_mythos/main.py` of the installed distribution, as a module.

    The file is loaded by its path, since the package's `__init__` imports `transformers`, which the model does not
    need.

    Raises:
        ModuleNotFoundError: the distribution is not installed; the message says how to install it.
        ImportError: the file does not load.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        path = distribution("open-mythos").locate_file("open_mythos/main.py")
    except PackageNotFoundError:
        raise ModuleNotFoundError("open-mythos is not installed: pip install --no-deps open-mythos==0.5.0") from None
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # `dataclass` looks its module up while the file loads
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
