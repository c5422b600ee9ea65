"""The teaching file computes what the reference computes, and its parameters have the reference's names."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.rdt_in_one_file import RDT
from tests.kit.tiny import relative, tiny_model, tokens

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "small": {},
    "nothing halts": dict(act_threshold=9.0),
    "deep": dict(max_loop_iters=6, act_threshold=0.9),
    "many heads": dict(n_heads=4, qk_nope_head_dim=3, v_head_dim=7),
    "one expert": dict(n_experts=1, n_experts_per_tok=1, n_shared_experts=0),
    "loop alone": dict(prelude_layers=0, coda_layers=0, lora_rank=1),
}


def results(model, ids, n_loops):
    """Logits, and the gradients of a loss by name."""
    logits = model(ids, n_loops=n_loops)
    logits.logsumexp(-1).mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("n_loops", [None, 1, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_the_references(name, n_loops):
    reference = tiny_model(**CONFIGS[name]).double()
    model = RDT(reference.cfg).double()
    model.load_state_dict(reference.state_dict())
    ids = tokens(2, 9)
    expected, expected_grads = results(reference, ids, n_loops)
    logits, grads = results(model, ids, n_loops)
    assert relative(logits, expected) < 1e-12
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        if expected_grads[name] is None:
            assert grad is None or not grad.any(), name
        else:
            assert float((grad - expected_grads[name]).norm()) <= 1e-12 * max(1.0, float(grad.norm())), name


def test_its_size():
    assert len((ROOT / "examples/rdt_in_one_file.py").read_text().splitlines()) <= 200


def test_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "examples.rdt_in_one_file"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split(" by ")[1].split()[0]) < 1e-5
