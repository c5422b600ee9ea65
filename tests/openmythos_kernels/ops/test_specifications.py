"""Every op that says it has CPU kernels, in every case that it describes and in random ones: within the error budget,
gradients too, the same bits again and for any number of threads, wherever in memory its inputs lie.

New memory is NaN throughout (see `conftest.py`).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos_kernels.runtime import extension
from openmythos_kernels.verify.check import check, run, same_bits, trial
from openmythos_kernels.verify.specs import specifications
from tests.kit.memory import LAYOUTS, Guarded
from tests.kit.shapes import sizes

CPU = torch.device("cpu")
OPS = [d for d in specifications() if "cpu" in d.backends]
CASES = [
    pytest.param(d, case, dtype, id=f"{d}-{str(dtype).removeprefix('torch.')}-{case}")
    for d in OPS
    for dtype in d.dtypes
    for case in d.cases
]
# Enough work for several threads, where the first case is not.
MANY = {
    "loop_step": dict(tokens=700, dim=97),
    "loop_lora_step": dict(tokens=700, dim=97),
    "loop_down": dict(tokens=900, dim=97),
    "compact_active": dict(B=7, T=9001),
    "gather_rows": dict(B=7, T=1031),
    "scatter_rows": dict(B=7, T=1031),
    "moe_experts": dict(tokens=16, dim=300, inner=200),  # with more tokens PyTorch's matrix products decide
    "swiglu_ffn": dict(tokens=5, dim=400, inner=300),
    "rms_norm": dict(tokens=2111),
}
FORWARD_ONLY = {"swiglu_ffn"}  # with gradients PyTorch's matrix products decide
LIBRARY = {"mla_linear", "block_prompt"}  # matrix products of PyTorch's libraries decide


@pytest.fixture(autouse=True, scope="module")
def needs_extension():
    assert extension.module is not None, extension.reason


@pytest.mark.parametrize("specification, case, dtype", CASES)
def test_within_the_error_budget(specification, case, dtype):
    guarded = Guarded(LAYOUTS[0])
    check(specification, specification.cases[case], dtype, CPU, arrange=guarded)
    guarded.untouched()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("specification", OPS, ids=str)
def test_wherever_inputs_lie(specification, layout):
    for case in list(specification.cases.values())[:3]:
        guarded = Guarded(layout)
        check(specification, case, specification.dtypes[-1], CPU, arrange=guarded)
        guarded.untouched()


@pytest.mark.parametrize("specification", OPS, ids=str)
def test_random_sizes(specification):
    @given(sizes(specification), st.sampled_from(specification.dtypes), st.sampled_from(LAYOUTS), st.integers(0, 999))
    def checked(drawn, dtype, layout, seed):
        guarded = Guarded(layout)
        check(specification, drawn, dtype, CPU, seed, arrange=guarded)
        guarded.untouched()

    checked()


@pytest.mark.parametrize("specification", [d for d in OPS if d.name not in LIBRARY], ids=str)
def test_same_bits_for_any_number_of_threads(specification):
    case = {**next(iter(specification.cases.values())), **MANY.get(specification.name, {})}
    drawn, before = trial(specification, case, specification.dtypes[0], CPU), torch.get_num_threads()
    wanted = () if specification.name in FORWARD_ONLY else specification.differentiable
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(specification.fast, drawn.inputs, wanted, drawn.grads))
    finally:
        torch.set_num_threads(before)
    for name, value in results[0].items():
        assert all(same_bits(value, other[name]) for other in results[1:]), name
