"""On a GPU: every backend that an op has there, in every described case and dtype, not only the one that is chosen."""

import pytest
import torch

from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.description import descriptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RUNS = [(d, backend, dtype) for d in descriptions() for backend in d.backends if backend != "cpu" for dtype in d.dtypes]


@pytest.mark.parametrize("description, backend, dtype", RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_within_the_error_budget(description, backend, dtype):
    for sizes in description.cases.values():
        with backends.forcing(backend):
            check(description, sizes, dtype, torch.device("cuda"))
