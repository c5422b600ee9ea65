"""The Triton kernels of the loop step, beyond the cases of its specification (see tests/triton_on_cpu)."""

import dataclasses

import pytest
import torch

from openmythos import variants
from openmythos_kernels.ops.loop import loop_step
from openmythos_kernels.runtime import backends, target
from openmythos_kernels.verify.check import check
from openmythos_kernels.verify.specs import loop_step as step_spec
from tests.kit.loop import op_arguments, with_gradients

CPU = torch.device("cpu")
INTERPRETER = pytest.mark.parametrize("triton_mode", ["interpreter"])


@INTERPRETER
def test_more_rows_than_programs_of_the_backward_pass(triton_mode):
    """On a GPU with one multiprocessor, each of the two programs loops over several rows, the last over fewer."""
    small = dataclasses.replace(target.TARGETS["sm_80"], units=1)
    d = step_spec.SPECIFICATION
    with backends.forcing("triton"), target.targeting(small):
        check(d, dict(tokens=9, dim=1030, rank=1), torch.float32, CPU)


@INTERPRETER
@pytest.mark.parametrize("absent", [(0,), (1, 3), (2, 4), (0, 1, 2, 3)])
def test_absent_gradients(triton_mode, absent):
    from openmythos_kernels.ops.loop.step import LOOP_STEP_BACKWARD

    x = op_arguments(2, 9, 24, 2, torch.float32)
    out = loop_step(**x, loop=1, threshold=0.7, spend_remainder=False, enter=True, eps=1e-6)
    grads = [torch.randn_like(x[k]) for k in ("h", "h_out", "cumulative_p", "ponder", "e")]
    grads = [None if i in absent else g for i, g in enumerate(grads)]
    p, rstd = torch.rand(2, 9), torch.rand(2, 9)
    saved = [x[k] for k in ("h", "e", "lora_hidden", "cumulative_p", "running")] + [out.h, p, rstd]
    saved += [x[k] for k in ("lora_B", "log_A", "log_dt", "B", "halt_weight", "norm_weight", "emb")]
    expected = LOOP_STEP_BACKWARD(*grads, *saved, 0.7, False)
    with backends.forcing("triton"):
        got = LOOP_STEP_BACKWARD(*grads, *saved, 0.7, False)
    for i, (a, b) in enumerate(zip(got, expected)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, i=i: f"{i}: {text}")


@INTERPRETER
def test_decay_stays_below_one(triton_mode):
    x = op_arguments(1, 2, 16, 0, torch.float32)
    x |= {"log_A": torch.tensor([1e30, -1e30, -20.0, -16.6, -16.5, 0.0, 20.0, 21.0] * 2), "log_dt": torch.zeros(1)}
    x |= {"h": torch.ones_like(x["h"]), "e": torch.zeros_like(x["e"]), "f": torch.zeros_like(x["f"])}
    with backends.forcing("triton"):
        outputs, grads = with_gradients(x, loop_step)
    assert (outputs[0] >= 0).all() and (outputs[0] < 1).all()
    assert all(g.isfinite().all() for g in grads)


@INTERPRETER
@pytest.mark.parametrize("dim", sorted({make().dim for make in variants.VARIANTS.values()}))
def test_passes_over_memory(triton_mode, dim):
    """7 passes over (N, D) forward, at most 12 backward.

    Rows that are too wide to be held whole are read once more for their two dot products, which makes 13. Most of these
    reads hit a cache, which this count ignores.
    """
    from benchmarks.suites import traffic
    from openmythos_kernels.ops.loop import configs

    passes = traffic.loop_step(dim)
    assert passes == {"forward": 7, "backward": 9 if dim * 2 <= configs.WIDEST else 13}
