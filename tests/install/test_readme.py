"""The README's instructions for installing open-mythos cover what importing it needs."""

import ast
import importlib.metadata
import sys

import pytest

from tests.install.environment import ROOT


def test_everything_that_open_mythos_imports_is_installed():
    try:
        files = importlib.metadata.files("open-mythos")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open-mythos is not installed")
    imported = set()
    for path in (path for path in files if path.suffix == ".py" and path.parts[0] == "open_mythos"):
        for node in ast.parse(path.read_text()).body:  # imports inside functions and `try` are optional
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    needed = imported - set(sys.stdlib_module_names) - {"open_mythos", "torch"}
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("pip install transformers")
    )
    assert "--no-deps open-mythos==" in line and needed == {"transformers"}
