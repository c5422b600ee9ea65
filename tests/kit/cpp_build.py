"""Compiles the extension's C++ files with a sanitizer, or quickly, for what PyTorch takes this processor for.

Objects are cached. An object's key is the text of its source and of every header of ours that it includes: a changed
header compiles only the files that include it, and copies of the repository share their objects. PyTorch's headers,
which take most of a file's time, are read once a mode.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from building.recipe import HEADERS, capability

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "cpp"
THREADS = Path("tests/cpu_sanitizers/threads.cpp")  # an OpenMP runtime that ThreadSanitizer can follow

# PyTorch has no type information for the first. AddressSanitizer reports the accesses that the others would, and they
# take a fifth of the build's time.
_NOT_SANITIZED = ["-fno-sanitize=vptr,null,object-size,pointer-overflow"]
# Replaces -O3 -g0. -O1 keeps reports readable and compile times short; with AddressSanitizer, -Og takes a third of -O1.
MODES = {
    "asan": ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *_NOT_SANITIZED],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "quick": ["-O1"],  # results, rounding included, are those of -O3
}
_LIBRARIES = {"asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}

Edit = Callable[[str, str], str]  # (path relative to csrc/cpu, text) -> text, to seed faults


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def libraries(mode: str) -> list[str]:
    """The sanitizer's libraries, to be preloaded before Python starts."""
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in _LIBRARIES[mode]
    ]
    return [path for path in found if Path(path).is_absolute()]


def missing(mode: str) -> str:
    """Why nothing can be built here, or ""."""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    if len(libraries(mode)) < len(_LIBRARIES[mode]):
        return f"{compiler()} has no {', '.join(_LIBRARIES[mode])}"
    return ""


def tree(mode: str, edit: Edit | None = None) -> Path:
    """A working directory with the packages, the tests and the instrumented extension."""
    folder = WORK / "_".join([mode, capability().lower(), *(["seeded"] if edit else [])])
    for name in ("openmythos", "openmythos_kernels", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
        # Also without the installed extension's record, which may name another capability.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(extension(mode, edit or (lambda name, text: text)), folder / "openmythos_kernels" / "_C.so")
    return folder


def extension(mode: str, edit: Edit = lambda name, text: text, root: Path = ROOT, jobs: int | None = None) -> Path:
    """The shared library of the sources below `root`, a copy of the repository with the same list of sources; compiled
    by `jobs` processes at once (default: one a core).

    Raises:
        RuntimeError: a file does not compile, with the compiler's message.
    """
    flags, sources = _recipe(mode)
    flags = [*flags, "-include", str(_precompiled(flags))]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(root, source, edit, flags), sources))
    out = objects[0].with_name(f"{_hash(*map(str, objects))}.so")
    if not out.exists():
        libraries = [f for path in library_paths() for f in (f"-L{path}", f"-Wl,-rpath,{path}")]
        # Our OpenMP runtime must take precedence over the one that PyTorch has loaded.
        own = ["-Wl,-Bsymbolic"] if mode == "tsan" else ["-fopenmp"]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch_python", *own]
        _run([compiler(), "-shared", *MODES[mode], *map(str, objects), *libraries], out)
    return out


@functools.cache
def _recipe(mode: str) -> tuple[list[str], list[Path]]:
    """Flags, and sources relative to the root; setup.py declares them."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401  (brings distutils to Pythons that have none)

    declared = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules[0]
    flags = [f for f in declared.extra_compile_args["cxx"] if f not in ("-O3", "-g0")]
    flags += ["-fPIC", "-fno-omit-frame-pointer", "-w", "-DTORCH_EXTENSION_NAME=_C", *MODES[mode]]
    flags += [*(f"-isystem{path}" for path in include_paths()), f"-isystem{_python_headers()}"]
    sources = [Path(name) for name in declared.sources if name.endswith(".cpp") and "/cuda/" not in name]
    return flags, sources + ([THREADS] if mode == "tsan" else [])


def _precompiled(flags: list[str]) -> Path:
    """A header beside its precompiled form, which compilers take instead of it where the flags are the same."""
    header = WORK / "objects" / f"torch_{_hash(HEADERS, torch.__version__, *flags)}.h"
    out = header.with_name(f"{header.name}.gch")
    if not out.exists():
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(HEADERS)
        _run([compiler(), *flags, "-x", "c++-header", str(header)], out)
    return header


def _object(root: Path, source: Path, edit: Edit, flags: list[str]) -> Path:
    text = edit(source.as_posix().partition("csrc/cpu/")[2], (root / source).read_text())
    headers = _headers(root / "csrc", text, {})
    key = _hash(text, *(f"{name}\0{headers[name]}" for name in sorted(headers)), torch.__version__, *flags)
    out = WORK / "objects" / f"{source.stem}_{key}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", suffix=".cpp", dir=out.parent) as file:
            file.write(f'#line 1 "{root / source}"\n{text}')
            file.flush()
            _run([compiler(), *flags, f"-I{root / 'csrc'}", "-c", file.name], out)
    return out


def _headers(folder: Path, text: str, found: dict[str, str]) -> dict[str, str]:
    """Name below `folder` -> text, of every header that a text includes, directly or not."""
    for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
        if name not in found:
            found[name] = (folder / name).read_text()
            _headers(folder, found[name], found)
    return found


def _python_headers() -> str:
    return sysconfig.get_paths()["include"]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str], out: Path) -> None:
    """Runs a compiler that makes `out`, which is there whole or not at all: others may want the same file meanwhile."""
    with tempfile.NamedTemporaryFile(suffix=out.suffix, dir=out.parent, delete=False) as file:
        done = subprocess.run([*command, "-o", file.name], capture_output=True, text=True)
    if done.returncode:
        Path(file.name).unlink()
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    Path(file.name).replace(out)
