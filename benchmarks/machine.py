"""The machine that a run measures: processor, memory bandwidth, GEMM speed, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.timing import Clock, spread
from benchmarks.upstream import upstream_version

COPY_BYTES = 256 << 20
GEMM_SIZE = 2048


def describe(device: torch.device) -> dict:
    """What a reader needs to judge the figures, as plain values."""
    return {
        "device": device.type.upper(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "copy_gb_per_s": copy_bandwidth(device),
        "gemm_gflop_per_s": gemm_speed(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "openmythos-kernels": installed("openmythos-kernels"),
        "open-mythos": upstream_version(),
        "commit": commit(),
    }


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large tensor copy, counting bytes read and bytes written."""
    source = torch.ones(COPY_BYTES // 4, device=device)  # unwritten zeros would all be read from one page
    target = torch.empty_like(source)
    target.copy_(source)
    clock = Clock(device)
    seconds = spread([clock(lambda: target.copy_(source)) for _ in range(5)])["median"]
    return 2 * COPY_BYTES / seconds / 1e9


def gemm_speed(device: torch.device) -> float:
    """GFLOP/s of a large float32 matrix product."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))
    a @ b
    clock = Clock(device)
    seconds = spread([clock(lambda: a @ b) for _ in range(5)])["median"]
    return 2 * GEMM_SIZE**3 / seconds / 1e9


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of this checkout, followed by "+" if files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
