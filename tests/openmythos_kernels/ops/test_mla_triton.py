"""The Triton kernels of latent attention, in Triton's interpreter and as generated code for sm_80."""

import importlib.util
import os
import subprocess
import sys

import pytest

OPS = ("mla_attention", "mla_attend_latent", "mla_norm_rope", "mla_append")
CHECKS = [*(f"budget {op}" for op in OPS), "lse", "layouts", "groups", "splits", "decode"]


def checked(mode: str, check: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreter" else "0", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.openmythos_kernels.ops.mla_triton_checks", mode, *check.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("check", [*CHECKS, "addresses", "bytes_read"], ids=lambda c: "interpreted_" + c.replace(" ", "_"))
def test_in_the_interpreter(check):
    checked("interpreter", check)


@pytest.mark.skipif(not importlib.util.find_spec("tritonsim"), reason="tritonsim is not on the path")
@pytest.mark.parametrize("check", [*CHECKS, "variants"], ids=lambda c: "generated_" + c.replace(" ", "_"))
def test_as_generated_code(check):
    checked("ptxsim", check)
