"""The loop step's Triton kernels in Triton's interpreter, which is chosen before Triton is imported: a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from openmythos_kernels.ops.loop import loop_step
from openmythos_kernels.runtime import backends
from tests.openmythos_kernels.ops.test_loop import op_arguments, with_gradients

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-3000:] + run.stderr[-2000:]


@inside
@pytest.mark.parametrize("options", [{}, {"rest": True}, {"enter": False}], ids=str)
@pytest.mark.parametrize("B, T, dim, rank", [(2, 5, 24, 3), (1, 7, 97, 5), (1, 400, 13, 0), (0, 3, 16, 2), (1, 3, 4100, 1)])
def test_equals_the_cpu_kernels(B, T, dim, rank, options):
    torch.manual_seed(0)
    x = op_arguments(B, T, dim, rank, torch.float32)
    expected = with_gradients(x, loop_step, **options)
    with backends.forcing("triton"):
        got = with_gradients(x, loop_step, **options)
        again = with_gradients(x, loop_step, **options)
    for a, b, c in zip(sum(got, []), sum(expected, []), sum(again, [])):
        largest = b.float().abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, largest))
        assert torch.equal(a, c)


@inside
@pytest.mark.parametrize("absent", [(0,), (1, 3), (2, 4), (0, 1, 2, 3)])
def test_absent_gradients(absent):
    from openmythos_kernels.ops.loop.step import LOOP_STEP_BACKWARD

    torch.manual_seed(0)
    x = op_arguments(2, 9, 24, 2, torch.float32)
    out = loop_step(**x, loop=1, threshold=0.7, rest=False, enter=True, eps=1e-6)
    grads = [torch.randn_like(x[k]) for k in ("h", "h_out", "spent", "ponder", "e")]
    grads = [None if i in absent else g for i, g in enumerate(grads)]
    p, rstd = torch.rand(2, 9), torch.rand(2, 9)
    saved = [x[k] for k in ("h", "e", "low", "spent", "running")] + [out.h, p, rstd]
    saved += [x[k] for k in ("lora_B", "log_A", "log_dt", "B", "halt_weight", "norm_weight", "emb")]
    expected = LOOP_STEP_BACKWARD(*grads, *saved, 0.7, False)
    with backends.forcing("triton"):
        got = LOOP_STEP_BACKWARD(*grads, *saved, 0.7, False)
    for i, (a, b) in enumerate(zip(got, expected)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m: f"{i}: {m}")  # noqa: B023


@inside
def test_decay_stays_below_one():
    x = op_arguments(1, 2, 16, 0, torch.float32)
    x |= {"log_A": torch.tensor([1e30, -1e30, -20.0, -16.6, -16.5, 0.0, 20.0, 21.0] * 2), "log_dt": torch.zeros(1)}
    x |= {"h": torch.ones_like(x["h"]), "e": torch.zeros_like(x["e"]), "f": torch.zeros_like(x["f"])}
    with backends.forcing("triton"):
        outputs, grads = with_gradients(x, loop_step)
    assert (outputs[0] >= 0).all() and (outputs[0] < 1).all()
    assert all(g.isfinite().all() for g in grads)
