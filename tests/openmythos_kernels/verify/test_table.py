"""`python -m openmythos_kernels verify`: rows that pass, rows that fail, and rows that do not run."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from openmythos_kernels.runtime import extension
from openmythos_kernels.runtime.backends import OPS
from openmythos_kernels.verify import table
from openmythos_kernels.verify.specs import specifications

BY_NAME = {d.name: d for d in specifications()}
needs_extension = pytest.mark.skipif(extension.module is None, reason=str(extension.reason))


def test_ops_say_the_same_of_their_backends_in_both_places():
    specified = {d.name: set(d.backends) for d in BY_NAME.values()}
    assert specified == {op: set(backends) for op, backends in OPS.items() if op in specified}
    # The others are backwards, or a part of one; the gradients of their forward's specification check them.
    assert all(op.removesuffix("_backward").removesuffix("_weights") in specified for op in OPS)


@needs_extension
def test_a_good_op_passes(capsys):
    assert table.main("cpu", ["rms_norm"], ["fp32", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("pass") == 2 and "FAIL" not in printed


@needs_extension
def test_a_wrong_op_fails_and_says_where(monkeypatch, capsys):
    good = BY_NAME["loop_down"]

    def wrong(**inputs):
        out = dict(good.fast(**inputs))
        name = next(iter(out))
        out[name] = out[name] * 1.001
        return out

    monkeypatch.setattr(table, "specifications", lambda: [dataclasses.replace(good, fast=wrong)])
    assert table.main("cpu", None, ["fp32"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "break the error budget" in printed


@needs_extension
def test_an_op_that_raises_fails(monkeypatch):
    def broken(**inputs):
        raise ZeroDivisionError("no")

    row = table.verify(dataclasses.replace(BY_NAME["loop_down"], fast=broken), "fp32", torch.device("cpu"))
    assert row.verdict == "FAIL" and "ZeroDivisionError: no" in row.failures[0]


def test_what_has_no_kernel_here_is_not_run():
    row = table.verify(BY_NAME["mla_append"], "fp32", torch.device("cpu"))
    assert (row.verdict, row.cases) == ("not run", 0) and row.backend.startswith("reference (")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtypes", "fp8"], "--dtypes: got fp8"),
        (["--only", "nothing"], "--only: no op"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_bad_questions(arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "openmythos_kernels", "verify", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr
