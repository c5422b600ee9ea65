"""Attention's backward in one pass, which OPENMYTHOS_UNPROVEN=1 selects; mostly by tiles so small that many programs
add to one tile."""

import sys

import pytest
import torch

from openmythos_kernels.ops.mla import configs
from openmythos_kernels.ops.mla.launch import attention as launch
from openmythos_kernels.runtime import unproven
from openmythos_kernels.verify.specs import specifications
from tests.triton_on_cpu import modes
from tests.triton_on_cpu.test_specifications import guarded

OPS = {d.name: d for d in specifications() if d.name in ("mla_attention", "mla_attention_rows")}
NARROW = [(d, case, sizes) for d in OPS.values() for case, sizes in d.cases.items() if case != "wide heads"]
EMPTY = dict(rows=2, heads=2, nope=16, rope=8, v=16, tokens=20, keys=40, start=[20, 0], held=[40, 0])
NARROW.append((OPS["mla_attention"], "a row without keys", EMPTY))
FEW = {("mla_attention", "square"), ("mla_attention_rows", "some rows")}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(configs._ONCE, "sm_80", configs.Config(16, 16, 2, 2))


@pytest.fixture(autouse=True)
def no_other(monkeypatch):
    monkeypatch.setattr(launch, "attention_dkv_kernel", None)  # an error if it is launched


RUNS = [
    pytest.param(
        mode,
        d,
        sizes,
        id=f"{mode}-{d}-{case}",
        marks=[pytest.mark.slow] * (mode == "ptxsim" and (d.name, case) not in FEW),
    )
    for mode in modes.MODES
    for d, case, sizes in NARROW
]


def compare(mode, specification, sizes, monkeypatch):
    dtype = {"interpreter": torch.float16, "ptxsim": torch.bfloat16}[mode]
    if mode == "ptxsim":  # one program after the other, as it frees no barrier while another program waits
        monkeypatch.setitem(sys.modules["tritonsim"].opts, "batch", 1)
    with unproven.allowing():
        guarded(specification, sizes, dtype)


@pytest.mark.parametrize("triton_mode, specification, sizes", RUNS)
def test_within_the_error_budget(triton_mode, specification, sizes, small, monkeypatch):
    compare(triton_mode, specification, sizes, monkeypatch)


@pytest.mark.parametrize("triton_mode", ["ptxsim"])
def test_the_shipped_tile(triton_mode, monkeypatch):
    sizes = dict(rows=1, heads=1, nope=64, rope=32, v=64, tokens=100, keys=140, start=40)
    compare(triton_mode, OPS["mla_attention"], sizes, monkeypatch)
