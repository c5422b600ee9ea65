"""`python -m tests.kit.other_processors avx2|default`: the CPU kernels as another x86 processor would run them.

The extension is compiled for that capability into a folder of its own, and a fixed slice of the tests runs there with
PyTorch and oneDNN held to the same instructions. Objects are kept under build/ by the content of what they are made of.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.cpu_sanitizers import build

# What PyTorch and oneDNN are told. oneDNN has no floor below SSE4.1.
SETTINGS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
# Every described op in every case that has a name, products and teams too large for small tests, and a layer in one
# call.
SLICE = (
    "tests/openmythos_kernels/ops/test_specifications.py::test_within_the_error_budget",
    "tests/openmythos_kernels/ops/test_mla_linear.py",
    "tests/openmythos_kernels/ops/test_causal.py",
    "tests/openmythos_kernels/nn/paths/test_moe_inference.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.other_processors", description=__doc__.splitlines()[0])
    parser.add_argument("processor", choices=SETTINGS)
    name = parser.parse_args().processor
    environment = os.environ | SETTINGS[name]
    # Flags follow the capability that PyTorch reports, which it reads once: so in a process that begins with the
    # setting.
    script = f"from tests.cpu_sanitizers import build; print(build.tree({name!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=build.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return done.returncode
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *SLICE]
    return subprocess.run(command, cwd=done.stdout.strip(), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
