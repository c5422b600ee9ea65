"""Each seeded fault of a kernel is found in the modes that can see it, and a process that dies fails one test only."""

import os
import subprocess
import sys

import pytest
import torch

from tests.triton_on_cpu import modes

N, BLOCK = 37, 16
BOTH = modes.MODES


def run(x, out, read_to=N, write_to=N, shift=0, step=BLOCK):
    from tests.triton_on_cpu.faulty import double

    double[(-(-N // BLOCK),)](x, out, read_to, write_to, SHIFT=shift, STEP=step, BLOCK=BLOCK)


def tensors():
    return torch.arange(1.0, N + 1), torch.full((N,), float("nan"))


@pytest.mark.parametrize("triton_mode", BOTH)
def test_correct_kernel_passes(triton_mode):
    x, out = tensors()
    run(x, out)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("triton_mode", BOTH)
@pytest.mark.parametrize("fault", [{"read_to": N + 1}, {"write_to": N + 1}, {"shift": 1}], ids=str)
def test_out_of_bounds_access_is_found(triton_mode, fault):
    with pytest.raises(Exception, match=r"out.of.bounds") as error:
        run(*tensors(), **fault)
    if triton_mode == "interpreter":
        name, line = ("x", 11) if "read_to" in fault else ("out", 12)
        where = "4 bytes before out" if "shift" in fault else f"byte {4 * N} of {name}, which has {4 * N}"
        assert "double:" in str(error.value) and where in str(error.value) and f"faulty.py:{line}" in str(error.value)


@pytest.mark.parametrize("triton_mode", ["interpreter"])
def test_write_write_race_is_found(triton_mode):
    with pytest.raises(Exception, match="double: store of a place in out that another program writes"):
        run(*tensors(), step=BLOCK - 1)


@pytest.mark.parametrize("triton_mode", ["interpreter"])
def test_read_write_race_is_found(triton_mode):
    x, _ = tensors()
    run(x, x)  # no race: each program reads and writes its own block
    with pytest.raises(Exception, match="double: load of a place in x that another program writes"):
        run(x, x, step=BLOCK - 1)
    with pytest.raises(Exception, match="double: store of a place in out that another program reads"):
        run(x[1:], x, N - 1, N - 1, shift=0)


WORKER = """
import os, pytest

class PtxError(Exception):
    pass

@pytest.mark.parametrize("triton_mode", ["interpreter"])
@pytest.mark.parametrize("case", ["first", "dies", "not supported", "fault", "last"])
def test(triton_mode, case):
    if case == "dies":
        os._exit(7)
    if case == "not supported":
        raise PtxError("kernel: unsupported wgmma")
    if case == "fault":
        raise PtxError("kernel: global access out of bounds")
"""


def test_every_test_has_its_own_result(tmp_path):
    """Even if the process dies in another test. What a mode does not support is skipped, not passed."""
    (tmp_path / "test_worker.py").write_text(WORKER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_ON_CPU")}
    environment |= {"PYTHONPATH": os.getcwd(), "PYTEST_ADDOPTS": "-p tests.triton_on_cpu.plugin -p no:cacheprovider"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "test_worker.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    for case, outcome in {
        "first": "PASSED",
        "dies": "FAILED",
        "not supported": "SKIPPED",
        "fault": "FAILED",
        "last": "PASSED",
    }.items():
        assert f"[{case}-interpreter] {outcome}" in done.stdout, done.stdout
    assert "status 7" in done.stdout and "not checked: kernel: unsupported wgmma" in done.stdout
