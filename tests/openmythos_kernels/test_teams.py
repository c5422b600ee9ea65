"""Whole models compute the same if OpenMP provides fewer threads than requested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Large enough for products by oneDNN and for every kernel that uses a team of threads.
PROGRAM = """
import copy, torch
import openmythos_kernels
from tests.kit.tiny import relative, tiny_model, tokens

large = dict(
    vocab_size=300, dim=256, n_heads=4, n_kv_heads=2, max_seq_len=320, kv_lora_rank=64, q_lora_rank=96,
    qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, expert_dim=256, n_experts=8, lora_rank=8, max_loop_iters=3,
)
for fields, shape in (({}, (2, 9)), (large, (2, 300)), (large, (1, 300)), (large, (1, 4))):
    reference = tiny_model(**fields)
    fast = openmythos_kernels.accelerate(copy.deepcopy(reference))
    ids = tokens(*shape)
    with torch.no_grad():
        assert relative(fast(ids), reference(ids)) < 3e-5, ("prompt", shape)
        ours, expected = (model.generate(ids[:, :4], 4, temperature=0.0) for model in (fast, reference))
        assert torch.equal(ours, expected), ("decoding", shape)
    for model in (fast, reference):
        model(ids).logsumexp(-1).sum().backward()
    for (name, p), of_fast in zip(reference.named_parameters(), fast.parameters()):
        if p.grad is not None:
            assert relative(of_fast.grad, p.grad) < 1e-3, (name, shape)
"""


@pytest.mark.parametrize(
    "setting",
    [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}, {"OMP_MAX_ACTIVE_LEVELS": "0"}],
    ids=lambda setting: "-".join(*setting.items()),
)
def test_models(setting):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment = kept | {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"} | setting
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
