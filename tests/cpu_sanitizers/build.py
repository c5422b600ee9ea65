"""Compiles the extension's C++ files with a sanitizer, or quickly for another processor, into a copy of the package."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "cpu_sanitizers"
THREADS = HERE / "threads.cpp"

# Replaces -O3 -g0. -O1 keeps reports readable and compile times short.
MODES = {
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    # For tests.kit.other_processors; results, rounding included, are those of -O3.
    "avx2": ["-O1"],
    "default": ["-O1"],
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
    folder = WORK / (f"{mode}_seeded" if edit else mode)
    for name in ("openmythos", "openmythos_kernels", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
        # Also without the installed extension's record, which may name another capability.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(_extension(mode, edit or (lambda name, text: text)), folder / "openmythos_kernels" / "_C.so")
    return folder


def _extension(mode: str, edit: Edit) -> Path:
    """The shared library. Objects are cached by the hash of their inputs."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401  (brings distutils to Pythons that have none)

    declared = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules[0]
    flags = [f for f in declared.extra_compile_args["cxx"] if f not in ("-O3", "-g0")]
    flags += ["-fPIC", "-fno-omit-frame-pointer", "-w", "-DTORCH_EXTENSION_NAME=_C", *MODES[mode]]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths()), f"-isystem{_python_headers()}"]
    headers = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.h")))
    sources = [ROOT / name for name in declared.sources if name.endswith(".cpp") and "/cuda/" not in name]
    sources += [THREADS] if mode == "tsan" else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(lambda path: _object(path, edit(_below(path), path.read_text()), flags, headers), sources)
        )
    out = objects[0].with_name(f"{_hash(*map(str, objects))}.so")
    if not out.exists():
        libraries = [f for path in library_paths() for f in (f"-L{path}", f"-Wl,-rpath,{path}")]
        # Our OpenMP runtime must take precedence over the one that PyTorch has loaded.
        own = ["-Wl,-Bsymbolic"] if mode == "tsan" else ["-fopenmp"]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch_python", *own]
        _run([compiler(), "-shared", *MODES[mode], *map(str, objects), *libraries, "-o", str(out)])
    return out


def _below(path: Path) -> str:
    return path.as_posix().partition("csrc/cpu/")[2]


def _object(path: Path, text: str, flags: list[str], headers: str) -> Path:
    out = WORK / "objects" / f"{path.stem}_{_hash(text, headers, torch.__version__, *flags)}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        source = out.with_suffix(".cpp")
        source.write_text(f'#line 1 "{path}"\n{text}')
        _run([compiler(), *flags, "-c", str(source), "-o", str(out)])
    return out


def _python_headers() -> str:
    return sysconfig.get_paths()["include"]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
