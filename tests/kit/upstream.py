"""The public `open-mythos` package, loaded without its `__init__` (which needs transformers)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

NAME = "open_mythos_upstream"  # registered under this name, so that its objects can be pickled


def load_upstream() -> ModuleType:
    """`open_mythos/main.py` of the installed distribution.

    Raises:
        ModuleNotFoundError: when it is not installed, saying how to get it.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    try:
        distribution = importlib.metadata.distribution("open-mythos")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError("open-mythos is missing: pip install --no-deps open-mythos==0.5.0") from None
    spec = importlib.util.spec_from_file_location(NAME, distribution.locate_file("open_mythos/main.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module
