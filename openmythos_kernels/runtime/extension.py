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


module, reason = _load()
