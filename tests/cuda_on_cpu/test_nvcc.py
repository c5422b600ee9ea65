"""nvcc compiles every .cu file for every architecture, and no kernel spills registers, by the report of ptxas."""

import pytest

from tools import nvcc

pytestmark = pytest.mark.skipif(nvcc.compiler() is None, reason="nvcc is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("source", nvcc.SOURCES, ids=lambda path: path.name)
def test_no_spills_and_wide_accesses(source):
    """The same check as `python -m tools.nvcc` in `.ci/run`."""
    kernels = nvcc.table([source])
    assert {k.architecture for k in kernels} == set(nvcc.ARCHITECTURES)
    assert not [k for k in kernels if k.wrong]


def test_what_is_wrong_is_seen():
    words = (
        "_ZN2om11rows_kernelIfEEvi' for 'sm_80'\n 8 bytes stack frame, {} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info : Used 40 registers, 640 bytes smem"
    )
    wide = {"_ZN2om11rows_kernelIfEEvi": 3}
    kernel = nvcc.parse(words.format(0), "a.cu", "sm_80", wide)
    assert (kernel.name, kernel.registers, kernel.shared, kernel.wide, kernel.wrong) == (
        "rows_kernel<float>",
        40,
        640,
        3,
        "",
    )
    assert "spills" in nvcc.parse(words.format(16), "a.cu", "sm_80", wide).wrong
    assert "16-byte" in nvcc.parse(words.format(0), "a.cu", "sm_80", {}).wrong
