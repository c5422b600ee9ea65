"""Compiles the C++ extension after installation, for the running PyTorch, into a cache folder.

The folder's name says what an extension was compiled for: PyTorch's version, Python's ABI, the processor's vector width
and a digest of the sources. Processes that need the same extension wait for the one that compiles it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from openmythos_kernels.runtime import cache

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]  # mypy takes the module for its type

PACKAGE = Path(__file__).parents[1]
RECORD = "_build.json"  # building/extension.py writes it beside an extension, and where one could not be built
_PATTERNS = ("building/*.py", "csrc/**/*.*")


def sources() -> dict[str, Path]:
    """The extension's sources: path below their root -> file; empty if they are not installed."""
    for root in (PACKAGE / "_source", PACKAGE.parent):  # of a wheel, of a checkout
        if (root / "csrc" / "bindings.cpp").is_file():
            found = (path for pattern in _PATTERNS for path in root.glob(pattern) if path.is_file())
            return {path.relative_to(root).as_posix(): path for path in sorted(found)}
    return {}


def record(folder: Path) -> dict:
    """The record of the build in this folder; empty if none can be read."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def place() -> Path:
    """The folder of the extension for these sources and this PyTorch, Python and processor; it may not exist."""
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.git_version}".encode())
    for name, path in sources().items():
        digest.update(f"\0{name}\0".encode() + path.read_bytes())
    abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    width = torch.backends.cpu.get_cpu_capability().replace(" ", "")
    return cache.folder() / "extension" / f"torch-{torch.__version__}-{abi}-{width}-{digest.hexdigest()[:16]}"


def file(folder: Path) -> Path:
    """The extension's path in a folder."""
    return folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def compiled() -> Path:
    """The extension in the cache, compiled first if it is missing.

    Raises:
        RuntimeError: it could not be compiled; says why.
    """
    if not sources():
        raise RuntimeError("the C++ sources are not installed beside openmythos_kernels; install it again")
    try:
        folder = place()
        if not file(folder).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                if not file(folder).exists():  # no other process has compiled it meanwhile
                    _compile(folder)
    except OSError as error:
        raise RuntimeError(
            f"{cache.folder()} cannot be used ({error}); OPENMYTHOS_CACHE may name another folder"
        ) from error
    return file(folder)


def say(text: str) -> None:
    """Prints a line of progress to standard error."""
    print(f"openmythos_kernels: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process in at a time. A process that waited for one that failed fails with the same reason."""
    with open(f"{folder}.lock", "a+", encoding="utf-8") as lock:  # the system unlocks it when the process ends
        if _lock(lock):
            lock.seek(0)
            if reason := lock.read():
                raise RuntimeError(reason)
        lock.truncate(0)
        try:
            yield
        except RuntimeError as error:
            lock.write(str(error))
            lock.flush()
            raise


def _lock(file) -> bool:
    """Locks an open file; True if it had to wait for another process."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is compiling the C++ extension: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError:  # a file system without locks: at worst two processes compile the same
        pass
    return False


def _compile(folder: Path) -> None:
    """Compiles into a temporary folder beside `folder`, then moves the result there."""
    begin = time.monotonic()
    say(f"compiling the C++ extension for torch {torch.__version__}, which takes minutes")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as work:
        for name, path in sources().items():
            Path(work, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, Path(work, name))
        last = _run([sys.executable, "-m", "building", "built"], work)
        made = Path(work, "built", "openmythos_kernels")
        if not file(made).exists():
            raise RuntimeError(record(made).get("reason") or last or "the compilation ended without a message")
        if folder.exists():
            shutil.rmtree(folder)  # left by a build that broke off
        os.replace(made, folder)
    say(f"{file(folder)} is ready after {time.monotonic() - begin:.0f} s")


def _run(command: list[str], work: str) -> str:
    """Runs a build and prints its progress; returns the last line of its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the PyTorch of this process
    last = ""
    with subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            last = line.strip() or last
            if step := re.search(r"(\[\d+/\d+\])?.* -c (\S+\.(?:cpp|cu))\b", line):
                say(" ".join(filter(None, (step[1], Path(step[2]).name))))
    return last
