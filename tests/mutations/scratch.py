"""A copy of the repository, with its own C++ extension, in which faults are seeded.

It is kept under build/ between runs, so that a build compiles only what has changed.
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
# The parts of csrc/ in the extension of a machine without a GPU; tests/cuda_on_cpu compiles the other parts itself.
COMPILED = ("csrc/cpu/", "csrc/common/", "csrc/bindings.cpp")


class Scratch:
    """The copy, brought up to date with the repository; `seeded` applies one fault to it."""

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
        """Within, the copy has the fault.

        Raises:
            ValueError: the fault cannot be applied. RuntimeError: it does not compile.
        """
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
        """Builds the extension, if sources of the copy have changed since the last build."""
        if self._built:
            return
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        run = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        if run.returncode or "was NOT built" in run.stderr:
            raise RuntimeError(f"the extension does not compile:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        self._built = True

    def pytest(self, tests: str, ptxsim: Path, seconds: float) -> tuple[int, str]:
        """Runs a selection of the copy's tests. Returns the exit status of pytest, which is < 0 if it was killed by a
        signal or exceeded the time, and its output."""
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
        # Python would take stale bytecode for fresh if two faults of equal length came within a second.
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
        """Writes a file only if it changes, since builds go by the time of the last change."""
        path = TREE / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _words(tests: str) -> list[str]:
    """Splits "FILES -k EXPRESSION" at spaces, except within the expression."""
    files, dash, expression = tests.partition(" -k ")
    return files.split() + (["-k", expression] if dash else [])
