"""Every op with Triton kernels, in every case of its specification.

Outputs and gradients stay within the error budget and have the same bits in a second run; no access is out of bounds,
and there is no race. New memory is NaN, and inputs lie between guards. `modes.py` says what each mode checks.

By default, every case runs once per mode, in the first dtype of the mode, and one case in each other dtype. Ops that
take long to compile run the cases of SHORT, the first of them in the other dtypes; those of LAYERS, which are many
launches, in the first dtype alone. The rest is `-m slow`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.specs import specifications
from tests.kit.memory import LAYOUTS, Guarded
from tests.kit.shapes import sizes
from tests.triton_on_cpu import modes

CPU = torch.device("cpu")
SHORT = {
    ("interpreter", "moe_experts"): (
        "k = experts",
        "no shared expert",
        "no token",
        "k = 1",
        "one expert",
        "few to one",
        "tiles of several sizes, shared experts by the library",
    ),
    ("interpreter", "moe_experts_backward_add"): ("experts without a token", "no shared expert", "several"),
    ("interpreter", "moe_experts_backward_rows"): ("several",),
    ("ptxsim", "moe_experts_backward_rows"): ("experts without a token",),
    ("ptxsim", "moe_experts"): (
        "no shared expert",
        "first that are sorted",
        "last that are few",
        "float32 weights",
        "tiles of several sizes, shared experts by the library",
    ),
    ("ptxsim", "moe_experts_backward_add"): ("experts without a token", "no shared expert"),
    ("interpreter", "block_decode"): ("more rows than a tile",),
    ("interpreter", "loop_decode"): (),  # tests/openmythos_kernels/nn/paths/test_decode_on_gpu.py has whole models
    ("ptxsim", "block_decode"): (),  # all its kernels are those of the loop
    ("ptxsim", "loop_decode"): ("residual, two blocks, the rest at last",),
}
LAYERS = ("block_decode", "loop_decode")


def cases():
    for mode in modes.MODES:
        for d in specifications():
            if "triton" not in d.backends:
                continue
            short = SHORT.get((mode, d.name), tuple(d.cases))
            for i, dtype in enumerate(modes.dtypes(mode, d)):
                run = short[: 0 if d.name in LAYERS else 1] if i else short
                for case in d.cases:
                    marks = [] if case in run else [pytest.mark.slow]
                    name = f"{mode}-{d}-{str(dtype).removeprefix('torch.')}-{case}"
                    yield pytest.param(mode, d, case, dtype, id=name, marks=marks)


@pytest.mark.parametrize("triton_mode, specification, case, dtype", list(cases()))
def test_within_the_error_budget(triton_mode, specification, case, dtype):
    guarded(specification, specification.cases[case], dtype)


OPS = [d for d in specifications() if "triton" in d.backends]


@pytest.mark.parametrize("triton_mode", ["interpreter"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    "specification",
    # The repeated experts' inputs are those of `moe_experts`; of whole layers the specifications make all dense.
    [pytest.param(d, marks=[pytest.mark.slow] * d.name.startswith(("moe_experts_backward", *LAYERS))) for d in OPS],
    ids=str,
)
def test_layouts_of_inputs(triton_mode, specification, layout):
    """Any layout gives results within the budget, or a ValueError that names the layout."""
    case = (SHORT.get((triton_mode, specification.name)) or tuple(specification.cases))[0]
    try:
        guarded(specification, specification.cases[case], modes.dtypes(triton_mode, specification)[0], layout=layout)
    except ValueError as error:
        assert "densely packed" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("triton_mode", modes.MODES)
@pytest.mark.parametrize("specification", OPS, ids=str)
def test_random_sizes(triton_mode, specification):
    dtypes, layouts = (st.sampled_from(x) for x in (modes.dtypes(triton_mode, specification), LAYOUTS))

    @settings(max_examples=5)
    @given(sizes(specification), dtypes, layouts, st.integers(0, 999))
    def checked(drawn, dtype, layout, seed):
        guarded(specification, drawn, dtype, seed, layout)

    checked()


def guarded(specification, case, dtype, seed=0, layout=LAYOUTS[0]):
    arrange = Guarded(layout)
    with backends.forcing("triton"):
        check(specification, case, dtype, CPU, seed, arrange=arrange)
    arrange.untouched()
