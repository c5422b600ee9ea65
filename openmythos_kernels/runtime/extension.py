"""Loads the compiled extension once, and remembers why it could not be loaded.

It is in the package, where the installation puts it, or else in the cache, where `build` puts it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from openmythos_kernels.runtime import build as _later

_NAME = "openmythos_kernels._C"
_ORDER = ("DEFAULT", "AVX2", "AVX512")


def build() -> Path:
    """Compiles the C++ extension for this PyTorch and processor into the cache folder, and loads it.

    Takes minutes and prints its progress to standard error. Models accelerated before use the extension from their next
    call on; CUDA kernels need a new process. Does nothing if an extension is loaded already.

    Returns:
        The extension's file.

    Raises:
        RuntimeError: the extension could not be compiled or loaded; says why. Nothing has changed then.
    """
    global module, reason
    if module is None:
        path = _later.compiled()
        if _NAME in sys.modules:
            raise RuntimeError(
                f"{reason}; this process has loaded it, so remove it first: {sys.modules[_NAME].__file__}"
            )
        if _later.record(path.parent).get("cuda"):
            _later.say("its CUDA kernels are used from the next process on")
            return path
        module, reason = _from_cache(path)
        if module is None:
            raise RuntimeError(reason)
    return Path(module.__file__)


def _load():
    """Returns (module or None, reason or None). Never raises."""
    module, reason = _installed()
    if module is not None or _NAME in sys.modules:  # a second extension would register the same kernels again
        return module, reason
    try:
        wanted = os.environ.get("OPENMYTHOS_BUILD", "") not in ("", "0")
        path = _later.compiled() if wanted else _later.file(_later.place())
        if path.exists():
            return _from_cache(path)
    except Exception as error:  # for example: no home folder, no compiler
        return None, f"{reason.partition(';')[0]}; building it now failed: {error}"
    return None, reason


def _installed():
    """(module or None, reason or None) of the extension in the package."""
    record = _later.record(_later.PACKAGE)
    try:
        if importlib.util.find_spec(_NAME) is None:
            why = f" when this was installed: {record['reason']}" if record.get("reason") else ""
            return None, f"the C++ extension was not built{why}; openmythos_kernels.build() compiles it"
        # Checked before loading: an extension for another PyTorch may crash the process.
        if wrong := _unfit(record.get("torch", torch.__version__), record.get("capability", "")):
            return None, wrong
        module = importlib.import_module(_NAME)
    except Exception as error:  # a broken file must not break the reference
        return None, f"the C++ extension does not load ({type(error).__name__}: {error}); {_REBUILD}"
    wrong = _unfit(module.torch_version, module.cpu_capability)
    return (None, wrong) if wrong else (module, None)


def _from_cache(path: Path):
    """(module or None, reason or None) of a file in the cache, whose folder's name says that it fits."""
    try:
        spec: Any = importlib.util.spec_from_file_location(_NAME, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        failure = f"the C++ extension does not load ({type(error).__name__}: {error})"
        return None, f"{failure}; remove {path.parent} to rebuild it"
    sys.modules[_NAME] = module
    return module, None


_REBUILD = "openmythos_kernels.build() makes another, or reinstall to rebuild it"


def _unfit(version: str, capability: str) -> str:
    """Why an extension built for this PyTorch and vector width cannot run here; empty if it can."""
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"the C++ extension was built for torch {version} but torch {torch.__version__} is running; {_REBUILD}"
    machine = torch.backends.cpu.get_cpu_capability()
    if capability in _ORDER and machine in _ORDER and _ORDER.index(capability) > _ORDER.index(machine):
        return f"the C++ extension was built for {capability} but this processor offers {machine}; {_REBUILD}"
    return ""


def cuda_reason() -> str:
    """Why the extension's CUDA kernels cannot run here; empty if they can."""
    if module is None:
        return reason
    built = cuda_architectures(module)
    if not built:
        why = _later.record(Path(module.__file__).parent).get("without_cuda") or "nobody recorded why"
        return f"the C++ extension was built without CUDA kernels ({why})"
    if not torch.cuda.is_available():
        return "the extension has CUDA kernels, but PyTorch finds no usable GPU and driver"
    major, minor = torch.cuda.get_device_capability()
    for name in built:
        theirs, portable = float(name.removesuffix("+PTX").rstrip("af")), name.endswith("+PTX")
        if (int(theirs) == major and theirs <= float(f"{major}.{minor}")) or (
            portable and theirs <= float(f"{major}.{minor}")
        ):
            return ""
    return f"the extension's CUDA kernels were built for {', '.join(built)}, this GPU is {major}.{minor}"


def cuda_architectures(module) -> list[str]:
    """The architectures of the CUDA kernels, as in TORCH_CUDA_ARCH_LIST; empty without CUDA kernels."""
    return getattr(module, "cuda_architectures", "").replace(";", " ").split()


module, reason = _load()
