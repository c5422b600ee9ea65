"""A slice of test_kernels.py, with kernels built with AddressSanitizer + UBSan and with ThreadSanitizer."""

import subprocess
import sys

import pytest

from tests.cuda_on_cpu import build, harness
from tests.cuda_on_cpu.test_faults import environment

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())


@pytest.mark.slow  # builds and runs every kernel twice
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_kernels_are_clean(mode):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/cuda_on_cpu/test_kernels.py",
        "-k",
        "slice",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=build.ROOT, env=environment(mode), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout or "......" in done.stdout, done.stdout
