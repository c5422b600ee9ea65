"""The table of backends: a row for every op, the backend that runs, and why no faster one does."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmythos.compat import has_kernel
from openmythos_kernels import ops
from openmythos_kernels.runtime import backends, extension, unproven
from tests.cuda_on_cpu import harness

ROOT = Path(__file__).parents[3]


def registered() -> set[str]:
    """The names in `torch.ops.openmythos`, without those that tests define."""
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if ".kernels" not in module.name and ".launch" not in module.name:
            importlib.import_module(module.name)
    names = (schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("openmythos::"))
    return {name.removeprefix("openmythos::") for name in names if "::test_" not in name}


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "it is not built")


def test_every_op_has_a_row_and_every_row_an_op():
    assert registered() == set(backends.OPS)


@pytest.mark.skipif(extension.module is None, reason=str(extension.reason))
def test_the_dispatcher_has_the_kernels_of_the_rows():
    registered()
    # Tests of the CUDA kernels on the CPU, in the same process, register them too.
    compiled = bool(extension.cuda_architectures(extension.module)) or harness.loaded()
    for op, row in backends.OPS.items():
        assert has_kernel(f"openmythos::{op}", "CPU") == ("cpu" in row), op
        assert has_kernel(f"openmythos::{op}", "CUDA") == ("triton" in row or (compiled and "cuda" in row)), op


@pytest.mark.skipif(extension.module is None, reason=str(extension.reason))
def test_every_function_of_the_extension_is_an_op_or_exempt():
    functions = {name for name, value in vars(extension.module).items() if callable(value)}
    assert functions == set(backends.EXEMPTIONS)
    for name, exempt in backends.EXEMPTIONS.items():
        assert name in (ROOT / exempt.checked_by).read_text()


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_runs_somewhere_on_every_device(op):
    assert backends.choose(op, "cpu").backend == ("cpu" if "cpu" in backends.OPS[op] else "reference")
    with unproven.allowing():
        on_gpu = backends.choose(op, "cuda")  # there is no GPU, so the extension's kernels cannot be chosen
    assert on_gpu.backend == ("triton" if "triton" in backends.OPS[op] else "reference")
    assert bool(on_gpu.reason) == (on_gpu.backend != backends.OPS[op][0])


def test_kernels_that_no_gpu_has_run_are_not_chosen_without_the_switch(monkeypatch):
    monkeypatch.delenv(unproven.SWITCH, raising=False)
    for op in backends.UNPROVEN:
        found = backends.choose(op, "cuda")
        assert found.backend == "reference" and "OPENMYTHOS_UNPROVEN=1 selects them" in found.reason
        with unproven.allowing():
            assert backends.choose(op, "cuda").backend == "triton"
        assert backends.choose(op, "cuda") == found and backends.choose(op, "cpu") == backends.fastest(op, "cpu")


def test_an_ops_first_backend_runs_where_several_could(monkeypatch):
    monkeypatch.setattr(extension, "cuda_reason", lambda: "")
    assert backends.fastest("loop_step", "cuda") == backends.Choice("triton")
    assert backends.fastest("compact_active", "cuda") == backends.Choice("cuda")
    monkeypatch.setattr(backends, "_NO_TRITON", "it is not installed")
    assert backends.fastest("loop_step", "cuda") == backends.Choice("cuda", "it is not installed")


def test_compiled_graphs_run_what_eager_calls_run():
    """With the extension's CUDA kernels and Triton: the first of each row, for the dispatcher, which compiled graphs
    call, and for eager calls."""
    program = "tests.openmythos_kernels.runtime.with_cuda"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = {op: tuple(ran) for op, *ran in map(str.split, done.stdout.splitlines())}
    first = {op: next((b for b in row if b in ("triton", "cuda")), "") for op, row in backends.OPS.items()}
    assert found == {op: (backend, backend) for op, backend in first.items() if backend}


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
