"""Products large enough for oneDNN are right on every processor and with any number of threads.

oneDNN computes them only if it is certain to be right.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmythos_kernels.ops.mla import linear
from openmythos_kernels.verify.budget import assert_within_budget

ROOT = Path(__file__).parents[4]
RUNS_HERE = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
PROGRAM = """
import torch
from openmythos_kernels.ops.mla import linear
torch.manual_seed(0)
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    x, weight = torch.randn(300, 256), torch.randn(512, 256)
    print("error", float((linear(x, weight) - x.double() @ weight.double().t()).abs().max()))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(dtype):
    x, weight, grad = (torch.randn(*shape).to(dtype) for shape in ((3, 100, 256), (512, 256), (3, 100, 512)))

    def run(call, kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, weight)]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))]

    eager = torch.nn.functional.linear
    assert_within_budget(run(linear, dtype), run(eager, dtype), run(eager, torch.float64), names=["y", "dx", "dweight"])


@pytest.mark.parametrize(
    "setting, certain",
    [
        ({"OMP_NUM_THREADS": "2"}, True),
        ({"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}, True),
        ({"OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": "1"}, False),
        ({"OMP_NUM_THREADS": "2", "OMP_DYNAMIC": "true"}, False),
        ({"OMP_NUM_THREADS": "2", "OMP_MAX_ACTIVE_LEVELS": "0"}, False),
        ({"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"OMP_NUM_THREADS": "2", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, False),
        ({"OMP_NUM_THREADS": "2", "DNNL_DEFAULT_FPMATH_MODE": "ANY"}, False),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_onednn_is_used_only_where_it_is_right(setting, certain):
    unset = [name for name in os.environ if name.startswith(("OMP_", "DNNL_"))]
    environment = {name: value for name, value in os.environ.items() if name not in unset} | setting
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition("error ")[2]) < 1e-4
    assert (",cpu,matmul," in done.stdout) == (certain and RUNS_HERE)
