"""The folder that outlives this process: `$OPENMYTHOS_CACHE`, by default below ~/.cache."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """Where measured choices and compiled extensions are kept; it need not be there yet."""
    return Path(os.environ.get("OPENMYTHOS_CACHE") or Path.home() / ".cache" / "openmythos")
