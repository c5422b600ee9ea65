"""Other people's packages: imported where they are installed, skipped with a reason where not."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def need(name: str) -> ModuleType:
    """The package, or a skip that says how to get it. One that is there and cannot be imported is a failure of its
    own."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(
            f"{name} is not installed: pip install -r tests/outside/requirements.txt (lm-eval: by itself)",
            allow_module_level=True,
        )
    return importlib.import_module(name)
