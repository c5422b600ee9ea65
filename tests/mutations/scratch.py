"""A copy of the repository, with its own C++ extension, in which faults are seeded.

The extension is compiled quickly, with cached objects: a fault compiles the files that see it, its end compiles none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.kit import cpp_build
from tests.mutations.mutation import ROOT, Mutation

TREES = ROOT / "build" / "mutations"
_EXTENSION = "openmythos_kernels/_C.so"
# The parts of csrc/ in the extension of a machine without a GPU; tests/cuda_on_cpu compiles the other parts itself.
COMPILED = ("csrc/cpu/", "csrc/common/", "csrc/bindings.cpp")


class Scratch:
    """A copy, brought up to date with the repository; `seeded` applies one fault to it.

    Args:
        number: which copy; each may be used by one thread at a time.
        jobs: how many copies are used at once and share the machine's cores.
    """

    def __init__(self, number: int, jobs: int):
        self._tree = TREES / f"tree-{number}"
        # Python would take stale bytecode for fresh if two faults of equal length came within a second.
        self._environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self._share = max(1, (os.cpu_count() or 1) // jobs)
        if jobs > 1:
            self._environment["OMP_NUM_THREADS"] = str(self._share)
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
        for path in [p for p in self._tree.rglob("*") if p.is_file()]:
            name = path.relative_to(self._tree).as_posix()
            if name not in files and name != _EXTENSION and not name.startswith("build/") and path.suffix != ".pyc":
                path.unlink()
        self._built = False

    @contextlib.contextmanager
    def seeded(self, mutation: Mutation) -> Iterator[None]:
        """Within, the copy has the fault.

        Raises:
            ValueError: the fault cannot be applied. RuntimeError: it does not compile.
        """
        text = mutation.applied(self._tree)
        whole = (self._tree / mutation.file).read_bytes()
        compiled = mutation.file.startswith(COMPILED)
        try:
            self._write(mutation.file, text.encode())
            self._built = self._built and not compiled
            self._build()
            yield
        finally:
            self._write(mutation.file, whole)
            self._built = self._built and not compiled

    def _build(self) -> None:
        """Builds the extension, if sources of the copy have changed since the last build."""
        if self._built:
            return
        shutil.copy(cpp_build.extension("quick", root=self._tree, jobs=self._share), self._tree / _EXTENSION)
        self._built = True

    def pytest(self, tests: str, ptxsim: Path, seconds: float) -> tuple[int, str]:
        """Runs a selection of the copy's tests. Returns the exit status of pytest, which is < 0 if it was killed by a
        signal or exceeded the time, and its output."""
        self._build()  # a fault that has ended is in the extension still
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
        try:
            run = subprocess.run(
                command + _words(tests),
                cwd=self._tree,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return -1, f"no end within {seconds:.0f} s"
        return run.returncode, run.stdout + run.stderr

    def _write(self, name: str, content: bytes) -> None:
        """Writes a file only if it changes, since builds go by the time of the last change."""
        path = self._tree / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _words(tests: str) -> list[str]:
    """Splits "FILES -k EXPRESSION" at spaces, except within the expression."""
    files, dash, expression = tests.partition(" -k ")
    return files.split() + (["-k", expression] if dash else [])
