"""On a GPU: every backend that an op has there, in every described case and dtype, not only the one that is chosen."""

import pytest
import torch

from openmythos_kernels.runtime import backends
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
