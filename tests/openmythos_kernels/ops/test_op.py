"""Op: declared once, called directly or through the dispatcher, with the same results."""

import pytest
import torch

from openmythos_kernels.ops import op as module
from openmythos_kernels.ops.op import LIBRARY, Op


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
        fake=lambda x, weights, scale: torch.empty_like(x), setup_context=_save, backward=_backward,
    )  # fmt: skip
    LIBRARY.impl("test_weighted", lambda x, weights, scale: x * sum(weights) * scale, "CPU")
    return op


def inputs(grad=True):
    make = lambda: torch.randn(5, requires_grad=grad)  # noqa: E731
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
    """The direct path must be taken: it is what makes small calls cheap."""
    calls = []
    original = weighted._function.apply
    monkeypatch.setattr(weighted._function, "apply", lambda *a: calls.append("direct") or original(*a))
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


def test_flatten_round_trip():
    x, weights, scale = inputs()
    flat, layout = module._flatten((x, weights, scale))
    assert layout == (None, 3, None) and len(flat) == 5
    back = module._unflatten(flat, layout)
    assert back[0] is x and back[1] == weights and back[2] == scale
