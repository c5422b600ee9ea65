"""Third-party packages: imported if they are installed, otherwise the test is skipped."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def need(name: str) -> ModuleType:
    """Imports the package, or skips the test and says how to install it; if the import fails, the test fails."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(
            f"{name} is not installed: pip install -r tests/outside/requirements.txt (lm-eval: by itself)",
            allow_module_level=True,
        )
    return importlib.import_module(name)
