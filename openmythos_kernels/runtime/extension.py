"""Loads the compiled extension once, and remembers why it could not be loaded.

It lies in the package, where the installation put it, or else in the cache, where `build` put it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import torch

from openmythos_kernels.runtime import build as _later

_NAME = "openmythos_kernels._C"
_ORDER = ("DEFAULT", "AVX2", "AVX512")


def build() -> Path:
    """Compiles the C++ extension for this PyTorch and processor into the cache folder, and loads it.

    It takes minutes; progress goes to standard error. Models that were accelerated before use it from their next call
    on. CUDA kernels take a new process. Does nothing where the extension is loaded already.

    Returns:
        The extension's file.

    Raises:
        RuntimeError: why there is none; nothing has changed then.
    """
    global module, reason
    if module is None:
        path = _later.compiled()
        if _NAME in sys.modules:
            raise RuntimeError(
                f"{reason}; it has been loaded for that and must be removed first: {sys.modules[_NAME].__file__}"
            )
        if _later.record(path.parent).get("cuda"):
            _later.say("its CUDA kernels take the place of others when the next process starts")
            return path
        module, reason = _from_cache(path)
        if module is None:
            raise RuntimeError(reason)
    return Path(module.__file__)


def _load():
    """Returns (module or None, reason or None). Never raises."""
    module, reason = _installed()
    if module is not None or _NAME in sys.modules:  # what is loaded stays, and two would register the same kernels
        return module, reason
    try:
        wanted = os.environ.get("OPENMYTHOS_BUILD", "") not in ("", "0")
        path = _later.compiled() if wanted else _later.file(_later.place())
        if path.exists():
            return _from_cache(path)
    except Exception as error:  # no home folder, no compiler
        return None, f"{reason.partition(';')[0]}; building it now failed: {error}"
    return None, reason


def _installed():
    """(module or None, reason or None) of the extension in the package."""
    record = _later.record(_later.PACKAGE)
    try:
        if importlib.util.find_spec(_NAME) is None:
            why = f" when this was installed: {record['reason']}" if record.get("reason") else ""
            return None, f"the C++ extension was not built{why}; openmythos_kernels.build() compiles it"
        # Before it is loaded, as one for another PyTorch may do anything.
        if wrong := _unfit(record.get("torch", torch.__version__), record.get("capability", "")):
            return None, wrong
        module = importlib.import_module(_NAME)
    except Exception as error:  # a broken file must not take the reference down with it
        return None, f"the C++ extension does not load ({type(error).__name__}: {error}); {_REBUILD}"
    wrong = _unfit(module.torch_version, module.cpu_capability)
    return (None, wrong) if wrong else (module, None)


def _from_cache(path: Path):
    """(module or None, reason or None) of a file whose place says that it fits."""
    try:
        spec = importlib.util.spec_from_file_location(_NAME, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        return (
            None,
            f"the C++ extension does not load ({type(error).__name__}: {error}); remove {path.parent} to rebuild it",
        )
    sys.modules[_NAME] = module
    return module, None


_REBUILD = "openmythos_kernels.build() makes another, or reinstall to rebuild it"


def _unfit(version: str, capability: str) -> str:
    """Why an extension built for this PyTorch and vector width cannot be used here; empty when it can."""
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"the C++ extension was built for torch {version} but torch {torch.__version__} is running; {_REBUILD}"
    machine = torch.backends.cpu.get_cpu_capability()
    if capability in _ORDER and machine in _ORDER and _ORDER.index(capability) > _ORDER.index(machine):
        return f"the C++ extension was built for {capability} but this processor offers {machine}; {_REBUILD}"
    return ""


def cuda_reason() -> str:
    """Why the extension's CUDA kernels cannot run here; empty when they can."""
    if module is None:
        return reason
    built = cuda_architectures(module)
    if not built:
        return "the C++ extension was built without CUDA kernels, which need a CUDA build of PyTorch and nvcc"
    if not torch.cuda.is_available():
        return "the extension has CUDA kernels, but PyTorch finds no GPU and driver that it can use"
    major, minor = torch.cuda.get_device_capability()
    for name in built:
        theirs, portable = float(name.removesuffix("+PTX").rstrip("af")), name.endswith("+PTX")
        if (int(theirs) == major and theirs <= float(f"{major}.{minor}")) or (
            portable and theirs <= float(f"{major}.{minor}")
        ):
            return ""
    return f"the extension's CUDA kernels were built for {', '.join(built)}, this GPU is {major}.{minor}"


def cuda_architectures(module) -> list[str]:
    """What the CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST; empty without CUDA kernels."""
    return getattr(module, "cuda_architectures", "").replace(";", " ").split()


module, reason = _load()
