"""`python -m openmythos_kernels info`: versions, devices, the extension, and the backend of every op."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from openmythos_kernels.runtime import backends, extension


def describe() -> str:
    """The report as text. Never raises: a section that fails becomes a line that says why."""
    sections = [_versions, _devices, _extension, _ops, _exemptions]
    return "\n\n".join(_guarded(section) for section in sections)


def _guarded(section) -> str:
    try:
        return section()
    except Exception as error:  # a diagnostic must survive what it diagnoses
        return f"{section.__name__.strip('_')}: could not be read ({type(error).__name__}: {error})"


def _lines(title: str, rows: dict) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items())])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> str:
    packages = ("openmythos-kernels", "triton", "open-mythos", "numpy", "safetensors", "matplotlib")
    rows = {"python": sys.version.split()[0], "platform": platform.platform(), "torch": torch.__version__}
    return _lines("versions", rows | {package: _version(package) for package in packages})


def _devices() -> str:
    rows = {
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "torch built for": f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU only",
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    else:
        rows["gpu"] = "none that torch can use"
    return _lines("devices", rows)


def _extension() -> str:
    module = extension.module
    if module is None:
        return _lines("C++ extension", {"status": "NOT loaded", "reason": extension.reason})
    return _lines(
        "C++ extension",
        {
            "status": "loaded",
            "file": module.__file__,
            "compiler": module.compiler,
            "built for torch": module.torch_version,
            "vector width": module.cpu_capability,
            "OpenMP": "yes" if module.openmp else "no: one thread",
            "CUDA kernels": ", ".join(extension.cuda_architectures(module)) or extension.cuda_reason(),
        },
    )


def _ops() -> str:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = {}
    for op in backends.OPS:
        for device in devices:
            choice = backends.choose(op, device)
            rows[f"{op} on {device}"] = choice.backend + (f"   ({choice.reason})" if choice.reason else "")
    return _lines("ops (backend that runs)", rows)


def _exemptions() -> str:
    rows = {name: f"{exempt.why}; checked by {exempt.checked_by}" for name, exempt in backends.EXEMPTIONS.items()}
    return _lines("functions of the C++ extension that are no ops", rows)
