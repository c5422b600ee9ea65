"""Modified copies of open-mythos' main.py, like those in forks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.kit.upstream import load_upstream


def fork(folder: Path, *changes: tuple[str, str], name: str = "forked") -> ModuleType:
    """The installed main.py with every occurrence of each `old` replaced by its `new`, loaded from
    `folder`/open_mythos/main.py."""
    text = Path(load_upstream().__file__).read_text()
    for old, new in changes:
        assert old in text, f"the installed open-mythos has no {old!r}"
        text = text.replace(old, new)
    path = folder / "open_mythos" / "main.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module
