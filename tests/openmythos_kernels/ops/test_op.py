"""Op gives the same results whether it is called directly or through the dispatcher."""

import sys
from types import SimpleNamespace

import pytest
import torch

from openmythos.compat import applied, redispatch_to_cuda
from openmythos_kernels.ops.flat import flatten, unflatten
from openmythos_kernels.ops.op import LIBRARY, Op
from openmythos_kernels.runtime import backends


def _save(ctx, inputs, output):
    x, weights, scale = inputs
    ctx.save_for_backward(x, *weights)
    ctx.scale = scale


def _backward(ctx, grad):
    x, *weights = ctx.saved_tensors
    total = sum(weights)
    return grad * total * ctx.scale, [grad * x * ctx.scale for _ in weights], None


@pytest.fixture(scope="module")
def weighted():
    """x * sum(weights) * scale."""
    op = Op(
        "test_weighted(Tensor x, Tensor[] weights, float scale) -> Tensor",
        fake=lambda x, weights, scale: torch.empty_like(x),
        setup_context=_save,
        backward=_backward,
    )
    LIBRARY.impl("test_weighted", lambda x, weights, scale: x * sum(weights) * scale, "CPU")
    return op


def inputs(grad=True):
    def make():
        return torch.randn(5, requires_grad=grad)

    return make(), [make(), make(), make()], 0.5


def test_direct_path_equals_dispatcher_in_value_and_gradients(weighted):
    x, weights, scale = inputs()
    results = []
    for call in (weighted, weighted.overload):
        y = call(x, weights, scale)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *weights])))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_eager_calls_avoid_the_dispatchers_autograd(weighted, monkeypatch):
    """Eager calls must take the direct path, which makes small calls cheap."""
    calls = []
    monkeypatch.setattr("openmythos_kernels.ops.op.applied", lambda *a: calls.append("direct") or applied(*a))
    weighted(*inputs())
    assert calls == ["direct"]
    with torch.no_grad():
        assert not weighted(*inputs()).requires_grad
    assert calls == ["direct"]


def test_gradient_only_where_required(weighted):
    x, weights, scale = inputs(grad=False)
    weights[1].requires_grad_()
    weighted(x, weights, scale).sum().backward()
    assert x.grad is None and weights[0].grad is None and weights[1].grad is not None


def test_compiles_without_graph_break(weighted):
    x, weights, scale = inputs()
    compiled = torch.compile(lambda x, w: weighted(x, w, scale) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weights), weighted(x, weights, scale) + 1)


def test_fake_tensors_reach_the_fake(weighted):
    with torch._subclasses.FakeTensorMode():
        x, weights, scale = torch.empty(5), [torch.empty(5)], 0.5
        assert weighted(x, weights, scale).shape == (5,)


def test_opcheck(weighted):
    torch.library.opcheck(weighted.overload, inputs())


@pytest.mark.parametrize("call", ["direct", "dispatcher"])
def test_the_backward_is_not_autocast(call):
    """Not even if autocast is on when it runs: it would cast only some of the forward's tensors."""
    op = Op(
        f"test_product_{call}(Tensor x, Tensor weight) -> Tensor",
        fake=lambda x, weight: x @ weight,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        backward=lambda ctx, grad: (grad @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ grad),
    )
    LIBRARY.impl(op.name, lambda x, weight: x @ weight, "CPU")
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y = op(x, weight) if call == "direct" else op.overload(x, weight)
    outside = torch.autograd.grad(y, (x, weight), torch.ones_like(y), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def launch_by_triton(x):
    """As a Triton launch: see below."""
    return x + 1


@pytest.mark.parametrize("first", ["triton", "cuda"])
def test_the_dispatcher_runs_what_eager_calls_run(monkeypatch, recwarn, first):
    """The first backend of the op's row, as a GPU with the compiled extension would see it."""
    name = f"test_by_{first}"
    extension = torch.library.Library("openmythos", "IMPL")
    extension.impl(name, lambda x: x + 2, "CUDA")  # before the op is declared, as the extension does
    monkeypatch.setitem(backends.OPS, name, (first, "cuda" if first == "triton" else "triton"))
    monkeypatch.setattr(backends.extension, "cuda_reason", lambda: "")
    op = Op(f"{name}(Tensor x) -> Tensor", fake=torch.empty_like, triton=f"{__name__}:launch_by_triton")
    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or SimpleNamespace(launch_by_triton=launch_by_triton)
    )
    x, added = torch.zeros(2), {"triton": 1.0, "cuda": 2.0}
    assert backends.choose(name, "cuda").backend == first
    assert redispatch_to_cuda(op.overload, x)[0] == added[first]
    assert redispatch_to_cuda(op.overload, x.double())[0] == added["cuda"]  # which Triton's kernels do not take
    for backend, more in added.items():
        with backends.forcing(backend):
            assert op(x)[0] == more
    assert op._launches == (first == "triton") and not [w for w in recwarn if "Overriding" in str(w.message)]


def test_flatten_round_trip():
    x, weights, scale = inputs()
    flat, layout = flatten((x, weights, scale))
    assert layout == (None, 3, None) and len(flat) == 5
    back = unflatten(flat, layout)
    assert back[0] is x and back[1] == weights and back[2] == scale
