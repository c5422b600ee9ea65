"""`python -m tests.kit.other_processors avx2|default`: tests the CPU kernels as another x86 processor would run them.

It compiles the extension for that capability into a separate folder and runs a fixed slice of the tests there, with
PyTorch and oneDNN restricted to the same instructions. Object files are cached under build/ by a hash of their sources.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch

from tests.kit import cpp_build

# The restrictions of PyTorch and oneDNN; oneDNN accepts nothing below SSE4.1.
SETTINGS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
# Every case of every op, products by oneDNN, causal masks, and a layer in one call.
SLICE = (
    "tests/openmythos_kernels/ops/test_specifications.py::test_within_the_error_budget",
    "tests/openmythos_kernels/ops/mla/test_linear.py",
    "tests/openmythos_kernels/ops/mla/test_is_causal.py",
    "tests/openmythos_kernels/nn/paths/test_moe_inference.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.other_processors", description=__doc__.splitlines()[0])
    parser.add_argument("processor", choices=SETTINGS)
    name = parser.parse_args().processor
    if torch.backends.cpu.get_cpu_capability().lower() == name:
        print(f"{name}: this is what this processor has, so its own tests are those for it")
        return 0
    environment = os.environ | SETTINGS[name]
    # In a new process: PyTorch reads the capability, which the compiler flags depend on, only once.
    script = f"from tests.kit import cpp_build; print(cpp_build.tree({name!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cpp_build.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return done.returncode
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-m", "not slow", *SLICE]
    return subprocess.run(command, cwd=done.stdout.strip(), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
