"""Every op that says it has Triton kernels, in every case that it describes: within the error budget, gradients too,
the same bits again, no access outside its memory, no race. See `modes.py` for what each mode sees and does not see.

By default every case runs once a mode, in that mode's first dtype, and one case in the others; of ops that take long to
compile, the cases of SHORT. The rest is `-m slow`.
"""

import random

import pytest
import torch

from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.description import descriptions
from tests.triton_on_cpu import modes

CPU = torch.device("cpu")
SHORT = {
    ("ptxsim", "moe_experts"): ("no shared expert", "first that are sorted", "last that are few", "float32 weights"),
}


def cases():
    for mode in modes.MODES:
        for d in descriptions():
            if "triton" not in d.backends:
                continue
            short = SHORT.get((mode, d.name), tuple(d.cases))
            for i, dtype in enumerate(modes.dtypes(mode, d)):
                for case in d.cases:
                    marks = [] if case in short[: 1 if i else None] else [pytest.mark.slow]
                    name = f"{mode}-{d}-{str(dtype).removeprefix('torch.')}-{case}"
                    yield pytest.param(mode, d, case, dtype, id=name, marks=marks)


@pytest.mark.parametrize("triton_mode, description, case, dtype", list(cases()))
def test_within_the_error_budget(triton_mode, description, case, dtype):
    with backends.forcing("triton"):
        check(description, description.cases[case], dtype, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "triton_mode, description",
    [pytest.param(mode, d, id=f"{mode}-{d}") for mode in modes.MODES for d in descriptions() if "triton" in d.backends],
)
def test_random_sizes(triton_mode, description, seed):
    draw = random.Random(seed)
    sizes = next(iter(description.cases.values())) | {k: draw.randint(*limits) for k, limits in description.ranges.items()}
    with backends.forcing("triton"):
        check(description, sizes, modes.dtypes(triton_mode, description)[0], CPU, seed)
