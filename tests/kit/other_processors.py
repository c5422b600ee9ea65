"""`python -m tests.kit.other_processors avx2|default`: tests the CPU kernels as another x86 processor would run them.

It compiles the extension for that capability into a separate folder and runs a fixed slice of the tests there, with
PyTorch's libraries restricted to the same instructions. Objects are cached under build/ by a hash of their sources.
CI has both processors by way of the sanitizers' slices (`tests/cpu_sanitizers`), which spares it two compilations.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.kit import cpp_build

# The restrictions of PyTorch, oneDNN (which accepts nothing below SSE4.1) and MKL. Were one left out, eager PyTorch
# would round as on this processor, and the error budget would compare two processors.
SETTINGS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
# Every case of every op, products by oneDNN, causal masks, and a layer in one call.
SLICE = (
    "tests/openmythos_kernels/ops/test_specifications.py::test_within_the_error_budget",
    "tests/openmythos_kernels/ops/mla/test_linear.py",
    "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    "tests/openmythos_kernels/nn/paths/test_moe_inference.py",
)


def tree(processor: str, mode: str) -> Path:
    """`cpp_build.tree` for a processor: from a new process, as PyTorch reads its capability only once.

    Raises:
        subprocess.CalledProcessError: the extension does not compile; standard error has the compiler's message.
    """
    command = [sys.executable, "-c", f"from tests.kit import cpp_build; print(cpp_build.tree({mode!r}))"]
    environment = os.environ | SETTINGS[processor]
    done = subprocess.run(command, cwd=cpp_build.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.other_processors", description=__doc__.splitlines()[0])
    parser.add_argument("processor", choices=SETTINGS)
    name = parser.parse_args().processor
    if torch.backends.cpu.get_cpu_capability().lower() == name:
        print(f"{name}: this is what this processor has, so its own tests are those for it")
        return 0
    try:
        folder = tree(name, "quick")
    except subprocess.CalledProcessError as error:
        return error.returncode
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow", *SLICE]
    return subprocess.run(command, cwd=folder, env=os.environ | SETTINGS[name]).returncode


if __name__ == "__main__":
    sys.exit(main())
