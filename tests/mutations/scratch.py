"""A copy of the repository to seed faults into, with a C++ extension of its own.

It is kept between runs under build/, so that building again compiles only what differs from last time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.mutations.mutation import ROOT, Mutation

TREE = ROOT / "build" / "mutations" / "tree"
# Of csrc/, what the extension is made of on a machine without a GPU; tests/cuda_on_cpu compiles the rest by itself.
COMPILED = ("csrc/cpu/", "csrc/common/", "csrc/bindings.cpp")


class Scratch:
    """The copy, as it is now in the repository; `seeded` puts one fault into it at a time."""

    def __init__(self):
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        files = {name for name in listed if (ROOT / name).is_file()}
        for name in files:
            self._write(name, (ROOT / name).read_bytes())
        for path in [p for p in TREE.rglob("*") if p.is_file()]:
            name = path.relative_to(TREE).as_posix()
            if name not in files and not name.startswith("build/") and path.suffix not in (".so", ".pyc"):
                path.unlink()
        self._built = False

    @contextlib.contextmanager
    def seeded(self, mutation: Mutation) -> Iterator[None]:
        """The fault is in the copy within. Raises ValueError if it cannot be applied, RuntimeError if it does not
        compile."""
        text = mutation.applied(TREE)
        whole = (TREE / mutation.file).read_bytes()
        compiled = mutation.file.startswith(COMPILED)
        try:
            self._write(mutation.file, text.encode())
            self._built = self._built and not compiled
            self.build()
            yield
        finally:
            self._write(mutation.file, whole)
            self._built = self._built and not compiled

    def build(self) -> None:
        """Brings the extension up to date with the copy's sources, if any has changed since the last time."""
        if self._built:
            return
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        run = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        if run.returncode or "was NOT built" in run.stderr:
            raise RuntimeError(f"the extension does not compile:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        self._built = True

    def pytest(self, tests: str, ptxsim: Path, seconds: float) -> tuple[int, str]:
        """pytest's exit status (below 0: killed by a signal, or no end within the time) and what it printed, for a
        selection of the copy's tests."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            "--ptxsim",
            str(ptxsim),
        ]
        # Faults of same length within a second would leave compiled Python files that look fresh.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(
                command + _words(tests), cwd=TREE, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end within {seconds:.0f} s"
        return run.returncode, run.stdout + run.stderr

    @staticmethod
    def _write(name: str, content: bytes) -> None:
        """Only where something changes: compilers go by the time of writing."""
        path = TREE / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _words(tests: str) -> list[str]:
    """FILES -k EXPRESSION: the expression, which may have spaces, is one word and the last."""
    files, dash, expression = tests.partition(" -k ")
    return files.split() + (["-k", expression] if dash else [])
