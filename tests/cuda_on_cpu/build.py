"""Compiles .cu files for the host, plain or with a sanitizer. Results are cached by the hash of their inputs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.cuda_on_cpu.translate import translate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = sorted((ROOT / "csrc" / "cuda").glob("bindings*.cpp"))

# -O1 keeps reports readable and compile times short.
MODES = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}
_WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable", "-Wno-attributes"]


@cache
def cuda_include() -> Path | None:
    """The include folder of a CUDA toolkit or of NVIDIA's header wheels; None without either."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parents[1])]
    candidates = [Path(home) / "include" for home in homes if home]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates += sorted(packages.glob("cu*/include")) + sorted(packages.glob("cuda_runtime/include"))
    return next((folder for folder in candidates if (folder / "cuda_fp16.h").exists()), None)


def missing() -> str:
    """Why nothing can be built here, or ""."""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    if cuda_include() is None:
        return "there are no CUDA headers (neither a toolkit nor the packages nvidia-cuda-runtime, -crt and -cccl)"
    return ""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def kernels(sources: Sequence[Path], mode: str = "plain", edit: Callable[[str, str], str] | None = None) -> Path:
    """A library with the kernels of `sources` and the scheduler.

    Args:
        edit: (file name, text) -> text, to seed faults.
    """
    edit = edit or (lambda name, text: text)
    flags = [*_common(), *MODES[mode], *_WARNINGS]
    objects = [_runtime(path) for path in sorted((HERE / "runtime").glob("*.cpp"))]
    for source in sources:
        text = translate(edit(source.name, source.read_text()))
        text = f'#include "cuda_on_cpu.h"\n#line 1 "{source.name}"\n{text}'
        objects.append(_object(source.stem, text, flags))
    return _linked("kernels", objects, MODES[mode])


def bindings() -> Path:
    """A library that registers the ops' CUDA implementations. Load a library of the kernels first."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O0", "-std=c++20", "-w", f"-I{HERE / 'torch_stubs'}", *_common(), *(f"-I{p}" for p in include_paths())]
    text = "\n".join(f'// torch {torch.__version__}\n#line 1 "{path.name}"\n{path.read_text()}' for path in BINDINGS)
    libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
    return _linked("bindings", [_object("bindings", text, flags)], libraries)


def sanitizer_library(mode: str) -> str:
    name = {"asan": "libasan.so", "tsan": "libtsan.so"}[mode]
    return subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _common() -> list[str]:
    include = cuda_include()
    return ["-fPIC", f"-I{HERE / 'device'}", f"-I{ROOT / 'csrc'}", f"-isystem{include}", f"-isystem{include / 'cccl'}"]


def _runtime(path: Path) -> Path:
    return _object(path.stem, path.read_text(), [*_common(), "-O2", "-g", f"-I{path.parent}", *_WARNINGS])


def _object(name: str, text: str, flags: Sequence[str]) -> Path:
    flags = list(flags) if any(f.startswith("-std") for f in flags) else ["-std=c++17", *flags]
    key = _key(text, *flags, _headers())
    out = CACHE / f"{name}-{key}.o"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source = CACHE / f"{name}-{key}.cpp"
        source.write_text(text)
        _run([compiler(), *flags, "-c", str(source), "-o"], out)
    return out


def _linked(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    out = CACHE / f"lib{name}-{_key(*(o.name for o in objects), *flags)}.so"
    if not out.exists():
        _run([compiler(), "-shared", "-fPIC", *map(str, objects), *flags, "-o"], out)
    return out


def _run(command: Sequence[str], out: Path) -> None:
    """Runs `command out`. The file appears atomically."""
    part = out.with_suffix(f".{os.getpid()}{out.suffix}")
    run = subprocess.run([*command, str(part)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-6000:]}")
    part.rename(out)


@cache
def _headers() -> str:
    files = [
        *HERE.glob("*/*.h"),
        *HERE.glob("torch_stubs/**/*.h"),
        *ROOT.glob("csrc/c*/**/*.h"),
        *ROOT.glob("csrc/cuda/*.cuh"),
    ]
    return _key(*(path.read_text() for path in sorted(files)))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
