"""Every op with CUDA kernels, in every case of its specification: within the error budget, gradients too, and with
reproducible bits. (test_kernels.py runs threads in other orders.)
"""

import pytest
import torch

from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.specs import specifications
from tests.cuda_on_cpu import harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())

CASES = [
    pytest.param(d, name, dtype, id=f"{d}-{name}-{str(dtype).removeprefix('torch.')}")
    for d in specifications()
    if "cuda" in d.backends
    for name in d.cases
    for dtype in d.dtypes
]


@pytest.mark.parametrize("specification, case, dtype", CASES)
def test_within_the_error_budget(specification, case, dtype):
    harness.run(check, specification, specification.cases[case], dtype, torch.device("cpu"))
