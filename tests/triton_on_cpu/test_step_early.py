"""The loop step's kernels that OPENMYTHOS_UNPROVEN=1 selects, in cases whose embedding they accept."""

import dataclasses

import pytest
import torch

from openmythos_kernels.ops.loop.kernels import step
from openmythos_kernels.ops.loop.launch import step as launch
from openmythos_kernels.runtime import unproven
from openmythos_kernels.verify.specs import loop_step
from tests.triton_on_cpu import modes
from tests.triton_on_cpu.test_specifications import guarded

CASES = {
    "several rows a program": dict(tokens=37, dim=128, rank=8),
    "ragged columns": dict(tokens=13, dim=384, rank=3),
    "last loop": dict(tokens=9, dim=128, rank=2, enter=False, spend_remainder=True, loop=3),
    "one row, no LoRA": dict(tokens=1, dim=128, rank=0),
    "one row a program": dict(tokens=5, dim=1152, rank=1),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So few that a program of the backward walks over several rounds of rows, as on a GPU with thousands of rows."""
    few = dataclasses.replace(launch.current(), units=1)
    monkeypatch.setattr(launch, "current", lambda: few)


RUNS = [
    pytest.param(mode, case, marks=[pytest.mark.slow] * (mode != "interpreter" and case != "several rows a program"))
    for mode in modes.MODES
    for case in CASES
]


@pytest.mark.parametrize("triton_mode, case", RUNS)
def test_within_the_error_budget(triton_mode, case, monkeypatch):
    for other in ("loop_step_kernel", "loop_step_backward_kernel"):
        monkeypatch.setattr(step, other, None)  # an error if it is launched
    with unproven.allowing():
        guarded(loop_step.SPECIFICATION, CASES[case], modes.dtypes(triton_mode, loop_step.SPECIFICATION)[0])


@pytest.mark.parametrize("triton_mode", ["interpreter"])
def test_without_the_switch_they_do_not_run(triton_mode, monkeypatch):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    monkeypatch.setattr(step, "loop_step_kernel", None)
    with pytest.raises(TypeError, match="not subscriptable"):
        guarded(loop_step.SPECIFICATION, CASES["one row, no LoRA"], torch.float32)


@pytest.mark.parametrize("triton_mode", ["interpreter"])
@pytest.mark.parametrize("case", ["several rows a program", "last loop"])
def test_the_others_walk_over_several_rounds_too(triton_mode, case):
    guarded(loop_step.SPECIFICATION, CASES[case], torch.float32)
