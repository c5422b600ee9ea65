"""The cache folder: `$OPENMYTHOS_CACHE`, by default ~/.cache/openmythos."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """The folder of tuned configurations and compiled extensions; it may not exist yet."""
    return Path(os.environ.get("OPENMYTHOS_CACHE") or Path.home() / ".cache" / "openmythos")
