"""Counts of bytes; tests/triton_on_cpu/test_faults.py tests that accesses are checked."""

import pytest
import torch


@pytest.mark.parametrize("triton_mode", ["interpreter"])
def test_bytes_are_counted_once_for_each_argument(triton_mode):
    from openmythos_kernels.verify.traffic import traffic as watched
    from tests.triton_on_cpu.faulty import double

    x, out = torch.ones(40), torch.empty(37)
    with watched() as launches:
        double[(3,)](x[3:], out, 37, 37, SHIFT=0, STEP=16, BLOCK=16)
        double[(3,)](out, out, 37, 30, SHIFT=0, STEP=16, BLOCK=16)
    first, second = launches
    assert first.kernel == "double" and first.loaded == {"x": 4 * 37} and first.stored == {"out": 4 * 37}
    assert (second.bytes_loaded, second.bytes_stored) == (4 * 37, 4 * 30)
    assert first.sizes == {"x": 4 * 37, "out": 4 * 37}
