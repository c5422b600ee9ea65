"""What the loop step's early kernels compile to. `tests/triton_on_cpu/test_step_early.py` has their numbers."""

import re

import pytest
import torch

from openmythos_kernels.runtime import unproven
from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.specs import loop_step

triton = pytest.importorskip("triton")
from openmythos_kernels.verify.ahead.build import build, gpu_target  # noqa: E402 - needs triton
from openmythos_kernels.verify.ahead.record import launches  # noqa: E402 - needs triton


def test_the_code_for_sm_90_loads_early():
    """In mythos_1b's forward nothing is loaded after a store. Its backward keeps the next row beside this one in at
    most 128 registers. Neither splits the embedding into loads of one element, nor spills."""
    target = TARGETS["sm_90"]
    sizes = loop_step.SPECIFICATION.shipped["mythos_1b"]
    with unproven.allowing():
        found = {x.name: x for x in launches(loop_step.SPECIFICATION, sizes, torch.bfloat16, target)}
    for name, most in {"loop_step_early_kernel": 80, "loop_step_backward_early_kernel": 128}.items():
        launch = found[name]
        built = build(launch, target)
        assert built.spilled == 0 and built.registers <= most, name
        ptx = triton.compile(launch.source(), target=gpu_target(target), options=launch.options).asm["ptx"]
        singles = len(re.findall(r"ld\.global\.b16", ptx))
        # One of log_dt; the forward's halt_bias, and a coordinate per rank.
        assert singles == (2 + sizes["rank"] if name == "loop_step_early_kernel" else 1), name
        if name == "loop_step_early_kernel":
            assert "ld.global" not in ptx[ptx.index("st.global") :]
