"""The moe ops' Triton kernels in Triton's interpreter, which is chosen before Triton is imported: a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from openmythos_kernels.ops.moe import describe_route, moe_experts
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from tests.openmythos_kernels.ops.test_moe import SHAPES, Fixed, cast, differentiate, lists, make

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETING, reason="run by test_in_the_interpreter")
CPU = torch.device("cpu")
ROUTING = {d.name: d for d in describe_route.DESCRIPTIONS}
EXPERTS = ("no token", "one token", "primes", "first grouped size", "K=1", "K=E", "no shared", "width one")


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-3000:] + run.stderr[-2000:]


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ROUTING["moe_route"].cases)
def test_route(case, dtype):
    op = ROUTING["moe_route"]
    results = []
    inputs = op.make(op.cases[case], dtype, CPU, torch.Generator().manual_seed(0))
    up = torch.randn(inputs["logits"].shape[0], inputs["k"], generator=torch.Generator().manual_seed(1)).to(dtype)
    for kind, call, backend in ((dtype, op.fast, "triton"), (dtype, op.reference, None), (torch.float64, op.reference, None)):
        logits = inputs["logits"].to(kind).requires_grad_()
        with backends.forcing(backend):
            found = call(logits=logits, bias=inputs["bias"].to(kind), k=inputs["k"])
            (grad,) = torch.autograd.grad(found["gates"], logits, up.to(kind))
        results.append(found | {"dlogits": grad})
    for name in op.exact:
        assert torch.equal(results[0][name], results[2][name]), name
    assert_within_budget(*({k: r[k] for k in ("gates", "dlogits")} for r in results))


@inside
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_route_of_what_is_not_finite(value):
    """The reference's choice, or where that leaves a choice between equals, a valid one; gates NaN where its are."""
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 4], logits[2, [0, 7]], logits[3] = value, value, value
    op = ROUTING["moe_route"]
    with backends.forcing("triton"):
        found = op.fast(logits=logits, bias=torch.zeros(9), k=3)
    expected = op.reference(logits=logits, bias=torch.zeros(9), k=3)
    assert (found["expert_idx"] >= 0).all() and (found["expert_idx"] < 9).all()
    assert all(len(set(row)) == 3 for row in found["expert_idx"].tolist())
    at = [logits.gather(1, r["expert_idx"]) for r in (found, expected)]
    torch.testing.assert_close(*at, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found["gates"], expected["gates"], equal_nan=True)


@inside
def test_route_takes_the_lower_of_equals():
    with backends.forcing("triton"):
        found = ROUTING["moe_route"].fast(logits=torch.tensor([[0.0, 2.0, -0.0, 2.0, 1.0]]), bias=torch.zeros(5), k=4)
    assert found["expert_idx"].tolist() == [[1, 3, 4, 0]]


@inside
@pytest.mark.parametrize("case", ROUTING["moe_sort"].cases)
def test_sort(case):
    op = ROUTING["moe_sort"]
    inputs = op.make(op.cases[case], torch.float32, CPU, torch.Generator().manual_seed(0))
    with backends.forcing("triton"):
        found = op.fast(**inputs)
    for name, expected in op.reference(**inputs).items():
        assert torch.equal(found[name], expected), name


def forced(layer, x):
    return moe_experts(x, layer.idx, layer.gates, *lists(layer))


def results(layer, x, dtype, kind, backend):
    layer, x = cast(layer, x, kind, grad=True)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    call = forced if backend else Fixed.__call__
    with backends.forcing(backend):
        found = differentiate(call(layer, x), layer, x, dy)
        with torch.no_grad():  # few tokens: the path without sorting
            return found | {"y without grad": call(layer, x)}


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", EXPERTS)
def test_experts(shape, dtype):
    kinds = ((dtype, "triton"), (dtype, None), (torch.float64, None))
    draws = [[results(*make(*SHAPES[shape], dtype, seed=s), dtype, *kind) for kind in kinds] for s in range(3)]
    assert_within_budget(*(pooled(r) for r in zip(*draws)))


@inside
@pytest.mark.parametrize("N", [5, 40])
def test_all_tokens_to_one_expert_and_the_same_bits_again(N):
    layer, x = make(N, 24, 17, 5, 2, 1, routing="one expert")
    found, again = (results(layer, x, torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not any(found[f"drouted_experts.{e}.{p}.weight"].any() for e in range(4) for p in ("gate", "up", "down"))
    expected = results(layer, x, torch.float32, torch.float64, None)
    for name, value in found.items():
        if expected[name] is not None:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4, msg=name)


@inside
@pytest.mark.parametrize("N", [3, 40])
def test_indices_outside_reach_no_memory(N):
    """A pair without an expert adds nothing, as if its gate were zero."""
    layer, x = cast(*make(N, 16, 8, 6, 2, 1), torch.float32, grad=False)
    inside_range = layer.idx.clone()
    layer.gates[:, 1] = 0
    with torch.no_grad(), backends.forcing("triton"):
        expected = forced(layer, x)
        layer.gates[:, 1] = float("nan")
        for wild in (-1, 6, 2**40):
            layer.idx = inside_range.clone()
            layer.idx[:, 1] = wild
            torch.testing.assert_close(forced(layer, x), expected)


@inside
def test_launches_do_not_depend_on_sizes(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launched = []
    run = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, **k: launched.append(self.fn.__name__) or run(self, *a, **k))
    seen = set()
    for shape in ((17, 16, 8, 4, 2, 1), (40, 16, 8, 7, 3, 2), (19, 16, 8, 3, 1, 1)):
        launched.clear()
        results(*make(*shape), torch.float32, torch.float32, "triton")
        seen.add(len([name for name in launched if not name.startswith("few")]))
    assert len(seen) == 1, seen
