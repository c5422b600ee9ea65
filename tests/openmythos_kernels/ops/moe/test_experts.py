"""The moe_experts op against the reference layer."""

import pytest
import torch

from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.verify.budget import assert_within_budget, pooled
from tests.kit.dtypes import LOW
from tests.kit.moe import Fixed, cast, lists, make
from tests.kit.threads import for_each_number

pytestmark = pytest.mark.usefixtures("needs_extension")

OP = torch.ops.openmythos.moe_experts.default
# N, D, I, E, K, S. Up to 128 tokens take another path than more tokens.
SHAPES = {
    "one token": (1, 64, 32, 8, 2, 2),
    "no token": (0, 64, 32, 8, 2, 2),
    "primes": (5, 37, 17, 7, 3, 1),
    "last decode size": (16, 32, 16, 32, 4, 2),
    "first grouped size": (17, 33, 19, 5, 2, 1),
    "many": (131, 48, 24, 6, 2, 2),
    "K=1": (9, 40, 8, 4, 1, 1),
    "K=E": (23, 16, 8, 3, 3, 1),
    "no shared": (31, 16, 8, 4, 2, 0),
    "width one": (3, 1, 1, 2, 1, 1),
    "pieces": (3, 270, 300, 3, 2, 1),  # threads share a matrix in pieces of 256 columns
    "last few": (128, 20, 12, 5, 2, 1),
    "first of many": (129, 20, 12, 5, 2, 1),
    "several blocks of many": (200, 270, 300, 3, 2, 1),
    "many, dim odd": (140, 33, 20, 4, 2, 1),  # the last bfloat16 of a row does not fill a 32-bit lane
    "many, inner odd": (140, 32, 21, 4, 1, 1),
}


def differentiate(y, layer, x, dy):
    """y and all gradients, by name."""
    inputs = {"x": x, "topk_weights": layer.topk_weights, **dict(layer.named_parameters())}
    inputs.pop("router.weight")
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype), allow_unused=True)
    return {"y": y, **{"d" + name: g for name, g in zip(inputs, grads)}}


def op(layer, x):
    return moe_experts(x, layer.idx, layer.topk_weights, *lists(layer))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_within_budget(shape, dtype):
    check_budget(*SHAPES[shape], dtype=dtype)


@pytest.mark.parametrize("routing", ["one expert", "few experts"])
@pytest.mark.parametrize("N", [4, 64])
def test_uneven_routing(routing, N):
    check_budget(N, 24, 16, 6, 2, 1, dtype=torch.float32, routing=routing)


def check_budget(*shape, dtype, **routing):
    draws = [budget_draw(*make(*shape, dtype, seed=seed, **routing), dtype) for seed in range(4)]
    assert_within_budget(*(pooled(results) for results in zip(*draws)))


def budget_draw(layer, x, dtype):
    """Outputs and gradients: of the op, of the reference, and of the reference in float64."""
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    results = []
    for kind, forward in ((dtype, op), (dtype, Fixed.__call__), (torch.float64, Fixed.__call__)):
        m, v = cast(layer, x, kind, grad=True)
        results.append(differentiate(forward(m, v), m, v, dy))
        with torch.no_grad():  # few tokens take another path without gradients
            results[-1]["y without grad"] = forward(m, v)
    fast = results[0]
    assert fast["y"].shape == x.shape and fast["y"].dtype == dtype
    assert all(g is not None for g in fast.values()), "every weight must get a gradient, even if it is zero"
    return results


@pytest.mark.parametrize("N", [3, 40])
def test_empty_experts_get_zeros_even_from_poisoned_memory(N):
    layer, x = make(N, 16, 8, 6, 2, 1, routing="few experts")
    layer, x = cast(layer, x, torch.float32, grad=True)
    clean = differentiate(op(layer, x), layer, x, torch.ones_like(x))
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        poisoned = differentiate(op(layer, x), layer, x, torch.ones_like(x))
        with torch.no_grad():
            assert op(layer, x).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, grad in poisoned.items():
        assert torch.equal(grad, clean[name]), name
        if name.startswith(("drouted_experts.4", "drouted_experts.5")):
            assert not grad.any(), name


def test_views_that_begin_at_an_odd_number():
    """Views of bfloat16 at an odd offset, which cannot be read in 32-bit lanes."""
    layer, x = cast(*make(150, 24, 16, 5, 2, 1), torch.bfloat16, grad=False)

    def moved(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    weights = lists(layer)
    with torch.no_grad():
        expected = op(layer, x)
        for x_, weights_ in ((moved(x), weights), (x, [[moved(w) for w in ws] for ws in weights])):
            torch.testing.assert_close(
                moe_experts(x_, layer.idx, layer.topk_weights, *weights_), expected, rtol=0.02, atol=0.02
            )


@pytest.mark.parametrize("N", [4, 40])
def test_strided_inputs(N):
    layer, x = cast(*make(N, 24, 16, 5, 2, 1), torch.float32, grad=False)
    weights = lists(layer)
    with torch.no_grad():
        expected = op(layer, x)
        wide = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
        turned = [[w.t().contiguous().t() for w in ws] for ws in weights]
        assert not wide.is_contiguous() and not turned[0][0].is_contiguous()
        idx, topk_weights = layer.idx.t().contiguous().t(), layer.topk_weights.t().contiguous().t()
        assert torch.equal(moe_experts(wide, idx, topk_weights, *turned), expected)


@pytest.mark.parametrize("wanted", ["x", "topk_weights", "routed", "shared"])
def test_gradients_for_some_inputs_only(wanted):
    layer, x = cast(*make(33, 24, 16, 5, 2, 2), torch.float32, grad=True)
    full = differentiate(op(layer, x), layer, x, torch.ones_like(x))
    layer.requires_grad_(False)
    chosen = {"x": {"x": x}, "topk_weights": {"topk_weights": layer.topk_weights}}.get(wanted) or {
        n: p for n, p in layer.named_parameters() if n.startswith(wanted)
    }
    for t in (x, layer.topk_weights):
        t.requires_grad_(False)
    for t in chosen.values():
        t.requires_grad_(True)
    grads = torch.autograd.grad(op(layer, x), list(chosen.values()), torch.ones_like(x))
    for name, grad in zip(chosen, grads):
        assert torch.equal(grad, full["d" + name]), name


@pytest.mark.parametrize("N", [1, 7, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time_direct_or_dispatched(N, dtype):
    layer, x = cast(*make(N, 40, 24, 8, 2, 2), dtype, grad=True)
    runs = [differentiate(op(layer, x), layer, x, torch.ones_like(x)) for _ in range(3)]
    runs.append(
        differentiate(OP(x, layer.idx, layer.topk_weights, *lists(layer), True)[0], layer, x, torch.ones_like(x))
    )
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
    with torch.no_grad():
        first = op(layer, x)
        assert torch.equal(first, op(layer, x))
        assert torch.equal(first, OP(x, layer.idx, layer.topk_weights, *lists(layer), False)[0])


@pytest.mark.parametrize("N, dtype", [(3, torch.float32), (300, torch.bfloat16)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(N, dtype):
    layer, x = cast(*make(N, 264, 130, 8, 2, 2), dtype, grad=False)
    with torch.no_grad():
        results = for_each_number((1, 2, 3, 4), lambda: op(layer, x))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("N", [2, 20])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(N, grad):
    layer, x = cast(*make(N, 8, 4, 3, 2, 1), torch.float32, grad=grad)
    layer.requires_grad_(grad)
    torch.library.opcheck(OP, (x, layer.idx, layer.topk_weights, *lists(layer), grad))


def test_opcheck_backward():
    layer, x = cast(*make(9, 8, 4, 3, 2, 1), torch.float32, grad=False)
    layer.requires_grad_(False)
    y, *saved = OP(x, layer.idx, layer.topk_weights, *lists(layer), True)
    backward = torch.ops.openmythos.moe_experts_backward.default
    torch.library.opcheck(
        backward, (y, x, layer.idx, layer.topk_weights, *lists(layer), *saved, True, True, False, False)
    )


@pytest.mark.parametrize("N", [2, 20])
def test_compiled_equals_eager(N):
    layer, x = cast(*make(N, 16, 8, 4, 2, 1), torch.float32, grad=True)
    compiled = torch.compile(
        lambda x, topk_weights: moe_experts(x, layer.idx, topk_weights, *lists(layer)).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    eager = differentiate(op(layer, x).sin(), layer, x, torch.ones_like(x))
    graph = differentiate(compiled(x, layer.topk_weights), layer, x, torch.ones_like(x))
    assert all(torch.equal(graph[name], eager[name]) for name in eager)


def test_bad_arguments_are_named():
    layer, x = cast(*make(4, 8, 4, 3, 2, 1), torch.float32, grad=False)
    weights, idx, topk_weights = lists(layer), layer.idx, layer.topk_weights

    def call(message, x=x, idx=idx, topk_weights=topk_weights, weights=weights):
        with pytest.raises(ValueError, match=message):
            moe_experts(x, idx, topk_weights, *weights)

    call(r"x must be .*\(2, 4, 8\)", x=x.expand(2, 4, 8))
    call(r"x must be .*int64", x=x.long())
    call("expert_idx must be .*int32", idx=idx.int())
    call("topk_weights must be .*float64", topk_weights=topk_weights.double())
    call("w_gate, w_up, w_down", weights=[[], [], [], *weights[3:]])
    call("shared_gate, shared_up, shared_down", weights=[*weights[:5], []])
    call(
        r"w_up\[1\] must be \(4, 8\)",
        weights=[weights[0], [*weights[1][:1], weights[2][0], weights[1][2]], *weights[2:]],
    )
    call(r"shared_down\[0\].*Double", weights=[*weights[:5], [weights[5][0].double()]])
    for bad in (3, -1):
        call(rf"expert_idx must lie in \[0, 3\), got {bad}", idx=idx.clone().index_fill_(1, torch.tensor([0]), bad))
