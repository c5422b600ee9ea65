"""RepeatedExperts, for several calls in a forward: it adds up in place the gradients that autograd would sum."""

import pytest
import torch

from openmythos import OpenMythos
from openmythos_kernels import accelerate
from openmythos_kernels.nn.paths import moe_repeated as layer
from openmythos_kernels.ops.moe import RepeatedExperts, moe_experts
from openmythos_kernels.ops.moe import once as once_file
from openmythos_kernels.ops.moe import repeated as repeated_file
from tests.kit.tiny import enliven, tiny_config

pytestmark = pytest.mark.usefixtures("needs_extension")

D, INNER, E, K, SHARED = 40, 24, 6, 2, 2
FEW, MANY = 9, 150  # tokens; the C++ code has a path for few tokens
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def weights(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def draw(count, *shape):
        return [
            (torch.randn(shape, generator=g, dtype=torch.float64) / 6).to(dtype).requires_grad_() for _ in range(count)
        ]

    routed = draw(E, INNER, D), draw(E, INNER, D), draw(E, D, INNER)
    return [*routed, draw(SHARED, INNER + 1, D), draw(SHARED, INNER + 1, D), draw(SHARED, D, INNER + 1)]


def calls(tokens, dtype=torch.float64):
    """The inputs of three calls. The last expert never gets a token, others do not in every call."""
    g = torch.Generator().manual_seed(1)
    made = []
    for t in range(3):
        x = torch.randn(tokens, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        topk_weights = torch.rand(tokens, K, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        made.append((x, torch.randint(t, E - 1, (tokens, K), generator=g), topk_weights))
    return made


def loss(experts, inputs):
    """Each call depends on the one before, as in loops, so that their backwards run one after the other."""
    total, before = 0, 0
    for x, expert_idx, topk_weights in inputs:
        before = experts(x + before, expert_idx, topk_weights).tanh()
        total = total + before.double().square().sum()
    return total


def leaves(lists, inputs):
    return [*(w for ws in lists for w in ws), *(x for one in inputs for x in (one[0], one[2]))]


def expected(lists, inputs, again=1):
    alike = [[w.detach().requires_grad_() for w in ws] for ws in lists]
    fresh = [
        (x.detach().requires_grad_(), idx, topk_weights.detach().requires_grad_()) for x, idx, topk_weights in inputs
    ]
    for _ in range(again):
        loss(lambda *call: moe_experts(*call, *alike), fresh).backward()
    return [leaf.grad for leaf in leaves(alike, fresh)]


def assert_close(lists, inputs, other):
    tolerance = TOLERANCE[inputs[0][0].dtype]
    for leaf, grad in zip(leaves(lists, inputs), other, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_equal_autograds_sums(tokens, dtype):
    lists, inputs = weights(dtype), calls(tokens, dtype)
    loss(RepeatedExperts(lists), inputs).backward()
    assert_close(lists, inputs, expected(lists, inputs))
    assert not lists[0][
        E - 1
    ].grad.any()  # zeros instead of None, since ranks must agree on which weights have gradients


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_float32_weights_of_low_precision_tokens(tokens):
    lists = weights(torch.float32)
    inputs = [
        (x.detach().bfloat16().requires_grad_(), idx, topk_weights.detach().float().requires_grad_())
        for x, idx, topk_weights in calls(tokens)
    ]
    loss(RepeatedExperts(lists), inputs).backward()
    assert lists[0][0].grad.dtype == torch.float32
    assert_close(lists, inputs, expected(lists, inputs))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_float32_weights_rounded_once(tokens):
    """Gives the same bits as bfloat16 weights, but float32 gradients."""
    lists = weights(torch.float32)
    low = [[w.detach().bfloat16().requires_grad_() for w in ws] for ws in lists]
    inputs = calls(tokens, torch.bfloat16)
    fresh = [
        (x.detach().requires_grad_(), idx, topk_weights.detach().requires_grad_()) for x, idx, topk_weights in inputs
    ]
    loss(RepeatedExperts(lists, torch.bfloat16), inputs).backward()
    loss(RepeatedExperts(low), fresh).backward()
    for ours, other in zip(leaves(lists, inputs), leaves(low, fresh), strict=True):
        assert ours.grad.dtype == ours.dtype and torch.equal(ours.grad, other.grad.to(ours.dtype))


def test_gradients_are_added_in_place_and_not_copied(monkeypatch):
    made, added = [], []
    first, more = repeated_file.EXPERTS_BACKWARD, repeated_file.EXPERTS_BACKWARD_ADD

    def recorded(*arguments):
        out = first(*arguments)
        made.append([grad.data_ptr() for grads in out[2:] for grad in grads])
        return out

    monkeypatch.setattr(repeated_file, "EXPERTS_BACKWARD", recorded)
    monkeypatch.setattr(repeated_file, "EXPERTS_BACKWARD_ADD", lambda *a: added.append(1) or more(*a))
    lists, inputs = weights(), calls(MANY)
    loss(RepeatedExperts(lists), inputs).backward()
    assert len(made) == 1 and len(added) == 2
    assert [w.grad.data_ptr() for ws in lists for w in ws] == made[0]


ORDERS = {(MANY, FEW, 5): [5, FEW], (FEW, MANY, 5): [5], (FEW, 5, MANY): [], (FEW, 5, 1): [1, 5, FEW]}


def sum_of_calls(experts, inputs):
    """Independent calls, whose backwards run from the last to the first."""
    return sum(experts(*call).double().square().sum() for call in inputs)


@pytest.mark.parametrize("tokens", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_calls_of_few_tokens_share_one_product(tokens, dtype, monkeypatch):
    """Rows are kept until a call of many tokens comes, whose gradients are added to the product's."""
    kept = []
    add = once_file.Once.add
    monkeypatch.setattr(once_file.Once, "add", lambda self, dy, *rest: kept.append(len(dy)) or add(self, dy, *rest))
    lists, inputs = weights(dtype), [calls(n, dtype)[c] for c, n in enumerate(tokens)]
    sum_of_calls(RepeatedExperts(lists, once=float("inf"), few=FEW), inputs).backward()
    assert kept == ORDERS[tokens]
    alike = [[w.detach().requires_grad_() for w in ws] for ws in lists]
    fresh = [tuple(x.detach().requires_grad_(x.is_floating_point()) for x in call) for call in inputs]
    sum_of_calls(lambda *call: moe_experts(*call, *alike), fresh).backward()
    assert_close(lists, inputs, [leaf.grad for leaf in leaves(alike, fresh)])


def test_kept_rows_and_a_second_backward_over_a_retained_graph():
    lists, inputs = weights(), calls(FEW)
    value = loss(RepeatedExperts(lists, once=float("inf")), inputs)
    value.backward(retain_graph=True)
    value.backward()
    assert_close(lists, inputs, expected(lists, inputs, again=2))


BAD_ROWS = {
    "x": ("x", lambda x: x[1:]),
    "dy": ("dy", lambda dy: dy.double()),
    "dpre": ("dpre", lambda dpre: dpre[1:]),
    "act": ("act", lambda act: act[1:]),
    "offsets descend": ("offsets", lambda offsets: offsets.flip(1)),
    "offsets lead outside": ("offsets", lambda offsets: offsets + 1),
    "pair": ("pair", lambda pair: pair - 1),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_do_not_fit_are_refused(case):
    """Two calls of three tokens, two experts each, of one expert."""
    name, spoil = BAD_ROWS[case]
    x, act = torch.zeros(6, 4), torch.zeros(12, 8)
    pair = torch.arange(6, dtype=torch.int32).repeat(2)
    offsets = torch.tensor([[0, 6], [0, 6]], dtype=torch.int32)
    given = dict(x=x, dy=x.clone(), dpre=torch.zeros(24, 8), act=act, offsets=offsets, pair=pair)
    torch.ops.openmythos.moe_experts_weights(*given.values(), [3, 3], x)
    given[name] = spoil(given[name])
    with pytest.raises(ValueError, match=f"{name}: "):
        torch.ops.openmythos.moe_experts_weights(*given.values(), [3, 3], x)


def test_second_backward_over_a_retained_graph():
    lists, inputs = weights(), calls(FEW)
    value = loss(RepeatedExperts(lists), inputs)
    value.backward(retain_graph=True)
    value.backward()
    assert_close(lists, inputs, expected(lists, inputs, again=2))


def test_partial_backwards_over_the_same_graph_leave_no_sums_behind():
    lists, inputs = weights(), calls(FEW)
    value = loss(RepeatedExperts(lists), inputs)
    torch.autograd.grad(value, inputs[0][0], retain_graph=True)
    torch.autograd.grad(value, lists[0][1], retain_graph=True)
    torch.autograd.grad(value, inputs[2][0], retain_graph=True, create_graph=True)
    value.backward()
    assert_close(lists, inputs, expected(lists, inputs))


@pytest.mark.parametrize("dtype, graph", [(None, False), (None, True), (torch.bfloat16, True)])
def test_a_weight_changed_in_between_is_refused(dtype, graph):
    """Copies in another dtype depend on the original weights only if a graph of the gradients is made."""
    lists, inputs = weights(torch.float32), calls(FEW, dtype or torch.float32)
    value = loss(RepeatedExperts(lists, dtype), inputs)
    with torch.no_grad():
        lists[1][2].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        value.backward(create_graph=graph)


def test_weights_with_other_uses():
    lists, inputs = weights(), calls(FEW)
    (loss(RepeatedExperts(lists), inputs) + sum(w.pow(3).sum() for ws in lists for w in ws)).backward()
    grads = expected(lists, inputs)
    for i, w in enumerate(w for ws in lists for w in ws):
        grads[i] = grads[i] + 3 * w.detach() ** 2
    assert_close(lists, inputs, grads)


@pytest.mark.parametrize("frozen", [slice(0, 3), slice(3, 6), slice(0, 6)], ids=["routed", "shared", "all"])
def test_frozen_weights(frozen):
    lists, inputs = weights(), calls(MANY)
    for w in (w for ws in lists[frozen] for w in ws):
        w.requires_grad_(False)
    loss(RepeatedExperts(lists), inputs).backward()
    for leaf, grad in zip(leaves(lists, inputs), expected(lists, inputs), strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-12)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize(
    "fields, options",
    [
        ({}, {}),
        ({}, dict(checkpoint_loops=True)),
        ({}, dict(grad_loops=2)),
        (dict(halting="off"), {}),
        (dict(halting="freeze"), {}),
        (dict(core_layers=2), {}),
        ({}, dict(n_loops=[1, 3])),
    ],
    ids=["plain", "checkpointed", "truncated", "off", "freeze", "two blocks", "loops per sequence"],
)
def test_in_a_model(fields, options, monkeypatch):
    made = []
    monkeypatch.setattr(layer, "RepeatedExperts", lambda *a: made.append(1) or RepeatedExperts(*a))
    torch.manual_seed(0)
    reference = enliven(OpenMythos(tiny_config(**fields))).double()
    fast = accelerate(enliven(OpenMythos(tiny_config(**fields))).double())
    options = {"n_loops": 3} | options
    ids = torch.arange(14).reshape(2, 7) % 37
    for model in (reference, fast):
        for _ in range(2):  # a second micro-batch adds to the first one's gradients
            model(ids, **options).square().sum().backward()
    for (name, a), b in zip(fast.named_parameters(), reference.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None or not a.grad.any(), name
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9 * float(b.grad.abs().max()), msg=name)
    assert made


def test_autocast_on_a_cpu_keeps_no_rows(monkeypatch):
    """It would round them to bfloat16."""
    kept = []
    monkeypatch.setattr(layer, "RepeatedExperts", lambda *a: kept.append(a[2] > 0) or RepeatedExperts(*a))
    model = accelerate(enliven(OpenMythos(tiny_config())))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(ids)
    assert kept == [True, False]


def test_hooks_and_no_grad_turn_it_off(monkeypatch):
    made = []
    monkeypatch.setattr(layer, "RepeatedExperts", lambda *a: made.append(1) or RepeatedExperts(*a))
    model = accelerate(enliven(OpenMythos(tiny_config())))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        model(ids)
    handle = model.recurrent.block.register_forward_pre_hook(lambda *a: None)
    model(ids)
    assert not made
    handle.remove()
    model(ids)
    assert made
