"""What attention's backward in one pass compiles to. `tests/triton_on_cpu/test_attention_once.py` has its numbers."""

import pytest
import torch

from openmythos_kernels.ops.mla import configs
from openmythos_kernels.runtime import unproven
from openmythos_kernels.runtime.target import TARGETS
from openmythos_kernels.verify.specs import mla_attention

triton = pytest.importorskip("triton")
from openmythos_kernels.verify.ahead.build import build, gpu_target  # noqa: E402 - needs triton
from openmythos_kernels.verify.ahead.record import launches  # noqa: E402 - needs triton

SPECIFICATION = next(d for d in mla_attention.SPECIFICATIONS if d.name == "mla_attention")


def recorded(name, variant="mythos_1b", dtype=torch.bfloat16):
    with unproven.allowing():
        found = launches(SPECIFICATION, SPECIFICATION.shipped[variant], dtype, TARGETS[name])
    return {x.name: x for x in found}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "sm_90")) for n in configs._ONCE])
def test_it_neither_spills_nor_reads_before_its_turn(name):
    target, launch = TARGETS[name], recorded(name)["attention_once_kernel"]
    assert build(launch, target).spilled == 0
    ptx = triton.compile(launch.source(), target=gpu_target(target), options=launch.options).asm["ptx"]
    before, turn = ptx.split("ld.acquire.gpu")
    turn, after = turn.split("red.release.gpu")
    assert "$L__BB" not in turn  # nothing of the turn stands elsewhere
    assert "ld.global.cg" in turn and "ld.global.cg" not in before
    assert "st.global.cg" in turn and "st.global.cg" not in before + after
    assert "cp.async" in ptx  # the loop is pipelined


def test_what_it_was_not_made_for_takes_two_passes():
    for found in (recorded("gfx942"), recorded("sm_90", dtype=torch.float32), recorded("sm_90", variant="mythos_10b")):
        assert "attention_dkv_kernel" in found and "attention_once_kernel" not in found
