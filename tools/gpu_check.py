"""`make gpu-check`, for a machine with a GPU: every kernel of every specified op, whole models, `verify`, benchmarks.

The report names the device. A step runs only if all steps before it passed, so nothing is measured after a failure.
Exit status: 0 all steps passed, 1 a step failed, 3 no GPU.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

NO_GPU = 3
ON_GPU = ["tests/openmythos_kernels/ops/test_on_gpu.py", "tests/openmythos_kernels/nn/test_on_gpu.py"]
# Hundreds of kernels are compiled first, in several processes if pytest-xdist is installed.
PROCESSES = ["-n", "8"] if importlib.util.find_spec("xdist") else []
STEPS = {
    "every kernel": ["-m", "pytest", "-q", *PROCESSES, *ON_GPU],
    "verify": ["-m", "openmythos_kernels", "verify", "--device", "cuda"],
    "benchmarks": ["-m", "benchmarks", "--device", "cuda", "--only", "kernels", "--only", "model"],
}


def main(out: Path = Path("results/gpu-check.md")) -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch finds no GPU; nothing was checked", file=sys.stderr)
        return NO_GPU
    status = check(out, machine(), run)
    print(f"wrote {out}")
    return status


def check(out: Path, title: str, run: Callable[[list[str]], tuple[int, str]]) -> int:
    """Runs the steps up to the first failure. Writes the report after each step, so that it survives one that hangs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text, failed = f"# GPU check\n\n{title}\n", False
    for name, arguments in STEPS.items():
        if failed:
            text += f"\n## {name}: not run\n"
        else:
            print(f"gpu-check: {name}", flush=True)
            status, printed = run(arguments)
            failed = status != 0
            text += (
                f"\n## {name}: {f'FAILED (status {status})' if failed else 'passed'}\n\n```\n{printed.strip()}\n```\n"
            )
        out.write_text(text)
    return int(failed)


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard output of a Python process; its standard error goes to the terminal."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def machine() -> str:
    """Device, driver and versions, one per line."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"
    except FileNotFoundError:  # ROCm
        driver = "unknown"
    return "\n".join(
        f"- {name}: {value}"
        for name, value in {
            "device": torch.cuda.get_device_name(),
            "driver": driver,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }.items()
    )


if __name__ == "__main__":
    sys.exit(main())
