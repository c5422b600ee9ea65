"""Every op that says it has CUDA kernels, in every case that it describes, within the error budget."""

import pytest
import torch

from openmythos_kernels.verify.budget import assert_within_budget
from openmythos_kernels.verify.description import descriptions
from tests.cuda_on_cpu import harness

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=harness.missing())

CASES = [
    pytest.param(d, name, dtype, id=f"{d}-{name}-{str(dtype).removeprefix('torch.')}")
    for d in descriptions() if "cuda" in d.backends for name in d.cases for dtype in d.dtypes
]  # fmt: skip


def wide(inputs):
    """The same inputs in float64."""
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("description, case, dtype", CASES)
def test_within_the_error_budget(description, case, dtype):
    made = description.make(description.cases[case], dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    fast = harness.run(description.fast, **made)
    eager, truth = description.reference(**made), description.reference(**wide(made))
    for name in description.exact:
        assert torch.equal(fast.pop(name), eager.pop(name)), name
        del truth[name]
    assert_within_budget(fast, eager, truth, dtype=dtype)
