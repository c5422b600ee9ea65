"""A clone of open-mythos' repository, whose tests no distribution contains and this repository may not copy.

`python -m tests.outside.clone` clones it into .open-mythos, from the address in the installed distribution. Without a
network it prints why not, and tests that need the clone are skipped. OPEN_MYTHOS_CLONE names another folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

from tests.mutations.mutation import ROOT

SECONDS = 20


def folder() -> Path:
    return Path(os.environ.get("OPEN_MYTHOS_CLONE", ROOT / ".open-mythos"))


def missing() -> str:
    """Why there is no clone; "" if there is one."""
    if (folder() / "tests" / "test_main.py").exists():
        return ""
    return f"{folder()} holds no clone of open-mythos: python -m tests.outside.clone"


def main() -> None:
    if not missing():
        return
    urls = dict(line.split(", ") for line in importlib.metadata.metadata("open-mythos").get_all("Project-URL"))
    command = ["git", "clone", "--quiet", "--depth", "1", urls["Repository"], str(folder())]
    try:
        subprocess.run(
            command,
            check=True,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no clone of open-mythos, its own tests will be skipped: {error}")


if __name__ == "__main__":
    main()
