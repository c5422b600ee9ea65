"""nvcc takes every .cu file for every architecture, and no kernel spills registers (static figures by ptxas)."""

import pytest

from tests.kit import nvcc

pytestmark = pytest.mark.skipif(nvcc.compiler() is None, reason="nvcc is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source):
    """`.ci/run` does the same by `python -m tests.kit.nvcc`."""
    kernels = nvcc.table([source])
    assert {k.architecture for k in kernels} == set(nvcc.ARCHITECTURES)
    assert not [k for k in kernels if k.spilled]


def test_a_spill_is_seen():
    block = "void (anonymous namespace)::k<float>(int)' for 'sm_80'\n 8 bytes stack frame, 12 bytes spill stores, 4 bytes " \
            "spill loads\nptxas info : Used 40 registers, 640 bytes smem"  # fmt: skip
    kernel = nvcc._parse(block, nvcc.SOURCES[0], "sm_80")
    assert (kernel.name, kernel.registers, kernel.spilled, kernel.shared) == ("k<float>", 40, 16, 640)
