"""Loads the compiled extension once, and remembers why it could not be loaded."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_ORDER = ("DEFAULT", "AVX2", "AVX512")


def _load():
    """Returns (module or None, reason or None). Never raises."""
    name = "openmythos_kernels._C"
    try:
        if importlib.util.find_spec(name) is None:
            return None, "the C++ extension is not built (no compiler at install time?); reinstall to build it"
        module = importlib.import_module(name)
    except Exception as error:  # a broken file must not take the reference down with it
        return None, f"the C++ extension does not load ({type(error).__name__}: {error}); reinstall to rebuild it"
    built, running = module.torch_version.split(".")[:2], torch.__version__.split(".")[:2]
    if built != running:
        return None, (
            f"the C++ extension was built for torch {module.torch_version} but torch {torch.__version__} is running; "
            "reinstall to rebuild it"
        )
    machine = torch.backends.cpu.get_cpu_capability()
    if module.cpu_capability in _ORDER and machine in _ORDER:
        if _ORDER.index(module.cpu_capability) > _ORDER.index(machine):
            return None, f"the C++ extension was built for {module.cpu_capability} but this processor offers {machine}"
    return module, None


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
        if int(theirs) == major and theirs <= float(f"{major}.{minor}") or portable and theirs <= float(f"{major}.{minor}"):
            return ""
    return f"the extension's CUDA kernels were built for {', '.join(built)}, this GPU is {major}.{minor}"


def cuda_architectures(module) -> list[str]:
    """What the CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST; empty without CUDA kernels."""
    return getattr(module, "cuda_architectures", "").replace(";", " ").split()


module, reason = _load()
