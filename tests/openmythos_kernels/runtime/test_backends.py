"""The backend table answers which backend runs and why not a faster one."""

import pytest

from openmythos_kernels.runtime import backends, extension


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "it is not built")


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_runs_somewhere_on_every_device(op):
    assert backends.choose(op, "cpu").backend == ("cpu" if "cpu" in backends.OPS[op] else "reference")
    on_gpu = backends.choose(op, "cuda")  # there is none here, so the extension's kernels cannot be chosen
    assert on_gpu.backend == ("triton" if "triton" in backends.OPS[op] else "reference")
    assert bool(on_gpu.reason) == (on_gpu.backend != backends.OPS[op][0])


def test_an_ops_first_backend_runs_where_several_could(monkeypatch):
    monkeypatch.setattr(extension, "cuda_reason", lambda: "")
    assert backends._fastest("loop_step", "cuda") == backends.Choice("triton")
    assert backends._fastest("compact_active", "cuda") == backends.Choice("cuda")
    monkeypatch.setattr(backends, "_NO_TRITON", "it is not installed")
    assert backends._fastest("loop_step", "cuda") == backends.Choice("cuda", "it is not installed")


def test_fallback_carries_its_reason(no_extension):
    choice = backends.choose("moe_experts", "cpu")
    assert not choice.fast and choice.reason == "it is not built"


def test_named_backend_must_run(no_extension):
    backends.require("moe_experts", "reference", "cpu")
    with pytest.raises(RuntimeError, match="it is not built"):
        backends.require("moe_experts", "cpu", "cpu")
    with pytest.raises(ValueError, match="must be auto or one of cuda, triton, cpu, reference"):
        backends.require("moe_experts", "tpu", "cpu")
    with pytest.raises(RuntimeError, match="does not run on cuda tensors"):
        backends.require("moe_experts", "cpu", "cuda")
