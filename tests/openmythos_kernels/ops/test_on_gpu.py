"""On a GPU, every backend of every op, not only the chosen one, in all cases and dtypes of the specifications."""

import pytest
import torch

from openmythos_kernels.runtime import backends, unproven
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.specs import specifications

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RUNS = [
    pytest.param(d, backend, dtype, sizes, id=f"{d.name}-{backend}-{str(dtype).removeprefix('torch.')}-{case}")
    for d in specifications()
    for backend in d.backends
    if backend != "cpu"
    for dtype in d.dtypes
    for case, sizes in d.cases.items()
]


@pytest.mark.parametrize("specification, backend, dtype, sizes", RUNS)
def test_within_the_error_budget(specification, backend, dtype, sizes):
    with backends.forcing(backend):
        check(specification, sizes, dtype, torch.device("cuda"))


# Widths whose rows are whole packs, with an embedding of a multiple of 16 elements.
UNPROVEN = {
    "mythos_1b": dict(tokens=515, dim=2048, rank=8),
    "last loop": dict(tokens=9, dim=384, rank=3, enter=False, spend_remainder=True, loop=3),
}


@pytest.mark.parametrize("case", UNPROVEN)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("specification", [d for d in specifications() if d.name == "loop_step"], ids=str)
def test_kernels_that_no_gpu_has_run(specification, backend, case):
    with backends.forcing(backend), unproven.allowing():
        for dtype in specification.dtypes:
            check(specification, UNPROVEN[case], dtype, torch.device("cuda"))
