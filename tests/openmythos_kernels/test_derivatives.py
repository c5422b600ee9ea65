"""Derivatives of whole models and layers equal the reference's, or an error names the op.

Second derivatives, forward mode, batches, autocast that differs in the backward, and tensor subclasses.
"""

import copy
import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp

import openmythos_kernels as ok
from openmythos.attention import CausalMask
from openmythos.config import HALTINGS, INJECTIONS
from openmythos_kernels.nn.paths.mla_recompute import MLARecompute
from openmythos_kernels.ops.mla import linear
from openmythos_kernels.ops.moe import RepeatedExperts, moe_experts
from tests.kit.thresholds import set_threshold
from tests.kit.tiny import relative, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("needs_extension")

IDS = tokens(2, 9)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
VARIANTS = [
    *(dict(injection=injection, halting=halting) for injection in INJECTIONS for halting in HALTINGS),
    dict(core_ffn="dense"),
    dict(lora_rank=0),
    dict(act_remainder="last"),
    dict(core_layers=2),
    dict(attn_type="gqa"),
]


def both(dtype=torch.float32, **fields):
    model = tiny_model(**fields).to(dtype)
    return model, ok.accelerate(copy.deepcopy(model))


def loss(model, parameters=None, **options):
    logits = model(IDS, **options) if parameters is None else functional_call(model, parameters, (IDS,), options)
    return logits.double().logsumexp(-1).sum()


def second(model, **options):
    """Gradients of the gradients' sum of squares."""
    names, parameters = zip(*model.named_parameters())
    first = torch.autograd.grad(loss(model, **options), parameters, create_graph=True, allow_unused=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), parameters, allow_unused=True)
    return dict(zip(names, again))


def same(found, expected, tolerance, exact=None):
    """Compares all gradients as one vector, since a single gradient may consist of rounding errors. exact: the same in
    float64; where `expected` itself is further from it than the tolerance, as a processor may round, `found` may be 4
    times as far from `expected`."""
    assert found.keys() == expected.keys()
    size = max(float(x.double().norm()) for x in expected.values() if x is not None)
    for name, x in expected.items():
        y = found[name]
        if x is None or y is None:  # idle experts have zeros or None
            assert (x is None or not x.any()) and (y is None or not y.any()), name
        else:
            bound = tolerance * max(float(x.double().norm()), 1e-2 * size)
            if exact is not None:
                bound = max(bound, 4 * float((x.double() - exact[name]).norm()))
            assert float((x.double() - y.double()).norm()) <= bound, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_second_derivatives_of_a_model(fields, dtype):
    reference, fast = both(dtype, **fields)
    exact = second(copy.deepcopy(reference).double()) if dtype == torch.float32 else None
    same(second(fast), second(reference), TOLERANCE[dtype], exact)


@pytest.mark.parametrize("options", [dict(grad_loops=2), dict(checkpoint_loops=True), dict(n_loops=[1, 3])], ids=str)
def test_second_derivatives_of_other_forwards(options):
    reference, fast = both()
    same(second(fast, **options), second(reference, **options), 1e-4)


def test_second_derivatives_from_latents(monkeypatch):
    set_threshold(monkeypatch, "mla_recompute", 0)
    reference, fast = both()
    calls = []
    apply = MLARecompute.apply
    monkeypatch.setattr(MLARecompute, "apply", lambda *args: calls.append(1) or apply(*args))
    same(second(fast), second(reference), 1e-4)
    assert calls


def test_create_graph_does_not_change_the_gradient():
    """Kernels compute it either way; the formula runs only if the graph is used."""
    _, fast = both(core_ffn="dense")
    parameters = list(fast.parameters())
    one, other = (
        torch.autograd.grad(loss(fast), parameters, create_graph=graph, allow_unused=True) for graph in (False, True)
    )
    for a, b in zip(one, other):
        assert a is b is None or torch.equal(a, b)


def transforms(model, dtype):
    """Tangents by jvp and by dual numbers, and second derivatives by forward and by reverse over reverse."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.linspace(-1, 1, p.numel(), dtype=dtype).view_as(p) for name, p in parameters.items()}
    with torch.no_grad():
        without = jvp(lambda p: loss(model, p), (parameters,), (directions,))[1]
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, directions[name]) for name, p in parameters.items()}
        dual = forward_ad.unpack_dual(loss(model, duals)).tangent
    slope = grad(lambda p: loss(model, p))
    forward = jvp(slope, (parameters,), (directions,))[1]
    reverse = grad(lambda p: sum((g * directions[name]).sum() for name, g in slope(p).items()))(parameters)
    return (
        {"jvp": without, "dual": dual}
        | {f"forward {n}": x for n, x in forward.items()}
        | {f"reverse {n}": x for n, x in reverse.items()}
    )


@pytest.mark.parametrize("fields", [{}, dict(halting="off"), dict(injection="parcae", core_ffn="dense")], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_transforms_of_a_model(fields, dtype):
    reference, fast = (transforms(model, dtype) for model in both(dtype, **fields))
    for kind in ("forward", "reverse", "jvp", "dual"):
        a, b = ({name: x for name, x in result.items() if name.startswith(kind)} for result in (fast, reference))
        same(a, b, TOLERANCE[dtype] * 5)


def test_functional_interface():
    results = []
    for model in both(torch.float64):

        def f(weight, model=model):
            return loss(model, {"embed.weight": weight, "head.weight": weight})

        weight = model.embed.weight.detach()
        direction = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)
        functional = torch.autograd.functional
        results.append(
            [
                functional.hvp(f, weight, direction)[1],
                functional.vhp(f, weight, direction)[1],
                functional.jvp(f, weight, direction)[1],
                functional.jacobian(f, weight),
            ]
        )
    for a, b in zip(*results):
        assert relative(b, a) < 1e-9


def test_hessian_of_a_block():
    """A batch of second derivatives."""
    reference, fast = both(torch.float64)
    freqs = reference.freqs_cis_mla[:3]
    results = []
    for model in (reference, fast):
        x = torch.linspace(-1, 1, 3 * 24, dtype=torch.float64).view(1, 3, 24)

        def f(few, model=model, x=x):
            return model.prelude[0](torch.cat((few, x[..., 4:]), -1), freqs, CausalMask(0, 3)).sin().sum()

        few = x[..., :4].clone()
        results.append((torch.func.hessian(f)(few), torch.autograd.functional.hessian(f, few, vectorize=True)))
    for a, b in zip(*results):
        assert relative(b, a) < 1e-9


def test_tangents_of_a_decoded_token():
    """Whole-layer ops have no derivatives, so inputs with tangents do not reach them."""
    results = []
    for model in both(torch.float64):
        weight = model.embed.weight.detach()
        direction = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight)
        found = []
        with torch.no_grad(), forward_ad.dual_level():
            parameters = {"embed.weight": forward_ad.make_dual(weight, direction)}
            parameters["head.weight"] = parameters["embed.weight"]
            cache = {}
            for at, ids in ((0, IDS[:, :4]), (4, IDS[:, 4:5])):
                logits = functional_call(model, parameters, (ids,), dict(kv_cache=cache, start_pos=at))
                found.append(forward_ad.unpack_dual(logits).tangent)
        results.append(found)
    for a, b in zip(*results):
        assert b is not None and relative(b, a) < 1e-9


# ---- autocast that differs in the backward ----

STATES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def casting(state):
    return torch.autocast("cpu", STATES[state] or torch.bfloat16, enabled=STATES[state] is not None)


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("behind", STATES)
def test_attention_uses_the_autocast_of_its_forward_in_the_backward(monkeypatch, before, behind):
    set_threshold(monkeypatch, "mla_recompute", 0)
    _, fast = both()
    attention, x = (
        fast.prelude[0].attn,
        torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0), requires_grad=True),
    )
    leaves, grads = [x, *attention.parameters()], []
    for state in ("off", behind):
        with casting(before):
            y = attention(x, fast.freqs_cis_mla[:9], CausalMask(0, 9))
        with casting(state):
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    other = "off" not in (before, behind) and before != behind  # PyTorch's products follow the autocast of the backward
    for a, b in zip(*grads):
        assert a.dtype == b.dtype and (relative(a, b) < 2e-2 if other else torch.equal(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_experts_ignore_the_autocast_of_the_backward(dtype, repeated, graph):
    lists, x, expert_idx, topk_weights = experts(dtype)
    call = RepeatedExperts(lists) if repeated else lambda *args: moe_experts(*args, *lists)
    y = call(x, expert_idx, topk_weights) + call(x, expert_idx, topk_weights)
    leaves, grads = [x, topk_weights, *(w for ws in lists for w in ws)], []
    for state in STATES:
        with casting(state):
            found = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True, create_graph=graph)
            if graph:
                found = torch.autograd.grad(sum(g.float().square().sum() for g in found), leaves, retain_graph=True)
        grads.append(found)
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert torch.equal(a, b)


def experts(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(shape, generator=draw).to(dtype).requires_grad_()

    lists = [[made(*shape) for _ in range(3)] for shape in ((5, 8), (5, 8), (8, 5)) * 2]
    return lists, made(7, 8), torch.randint(3, (7, 2), generator=draw), made(7, 2)


# ---- memory ----


@pytest.fixture
def without_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("graph", [False, True])
def test_repeated_experts_are_freed_with_the_last_reference(without_gc, dtype, graph):
    lists, x, expert_idx, topk_weights = experts()
    call = RepeatedExperts(lists, dtype)
    cast = [weakref.ref(w) for ws in call._shared.weights for w in ws]
    kept = [weakref.ref(call), weakref.ref(call._shared), *cast]
    y = call(x.to(call.dtype), expert_idx, topk_weights)
    grads = torch.autograd.grad(y.float().square().sum(), [x, lists[0][0]], create_graph=graph)
    if graph:
        torch.autograd.grad(sum(g.square().sum() for g in grads), [x, lists[0][0]])
    del call, y, grads
    assert not any(one() for one in kept)


@pytest.mark.parametrize("fields", [{}, dict(core_ffn="dense")], ids=str)
def test_a_step_leaves_nothing_for_the_collector(without_gc, fields):
    model = ok.accelerate(tiny_model(**fields))
    for graph in (False, True):
        torch.autograd.grad(loss(model), model.embed.weight, create_graph=graph)
        gc.collect()
        grads = torch.autograd.grad(loss(model), model.embed.weight, create_graph=graph)
        del grads
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            assert not [x for x in gc.garbage if isinstance(x, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()


# ---- inference tensors and subclasses ----


@pytest.mark.parametrize("part", ["block", "recurrent", "experts", "repeated"])
def test_a_tensor_made_in_inference_mode_trains(part):
    model = ok.accelerate(tiny_model())
    with torch.inference_mode():
        x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    freqs, mask, grads = model.freqs_cis_mla[:9], CausalMask(0, 9), []
    for given in (x, x.clone()):
        if part == "block":
            y, leaf = model.prelude[0](given, freqs, mask), model.prelude[0].attn.q_down.weight
        elif part == "recurrent":
            y, leaf = model.recurrent(given, given, freqs, mask), model.recurrent.injection.B
        else:
            lists, _, expert_idx, topk_weights = experts()
            call = (
                RepeatedExperts(lists) if part == "repeated" else lambda *args, lists=lists: moe_experts(*args, *lists)
            )
            y, leaf = call(given.reshape(-1, 8)[:7], expert_idx, topk_weights), lists[0][0]
        grads.append(torch.autograd.grad(y.sin().sum(), leaf)[0])
    assert torch.equal(*grads)


class Quantized(torch.Tensor):
    """A weight that supports some ops only, as in quantization libraries."""

    refuse = NotImplementedError

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            args = [x.inner if isinstance(x, Quantized) else x for x in args]
            return func(*args, **(kwargs or {}))
        if cls.refuse is None:
            return NotImplemented
        raise cls.refuse(f"unknown: {func}")


@pytest.mark.parametrize("refuse", [NotImplementedError, None])
@pytest.mark.parametrize("graded", [False, True])
def test_a_weight_of_another_class_is_named(monkeypatch, refuse, graded):
    monkeypatch.setattr(Quantized, "refuse", refuse)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.set_grad_enabled(graded), pytest.raises(TypeError, match="mla_linear: weight is a Quantized"):
        linear(x.requires_grad_(), Quantized(weight))
    lists, x, expert_idx, topk_weights = experts()
    lists = [list(ws) for ws in lists]
    lists[1][2] = Quantized(lists[1][2].detach())
    with torch.set_grad_enabled(graded), pytest.raises(TypeError, match=r"moe_experts: w_up\[2\] is a Quantized"):
        moe_experts(x, expert_idx, topk_weights, *lists)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["fake", "export", "trace", "grad"])
def test_expert_load_under_transforms(fast, kind):
    model = tiny_model().train()
    if fast:
        ok.accelerate(model)
    elif kind in ("fake", "export"):
        pytest.skip("the reference chooses experts by looking at numbers")
    if kind == "fake":
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(IDS))
    elif kind == "export":
        torch.export.export(model, (IDS,), strict=False)
    elif kind == "trace":
        torch.jit.trace(model, (IDS,), check_trace=False)
    else:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        grad(lambda p: loss(model, p))(parameters)
    load = model.recurrent.block.ffn.expert_load
    assert (load is None) == (kind != "grad")
    copied = copy.deepcopy(model)
    for one in (model, copied):
        one.recurrent.block.ffn.expert_load = None
        one(IDS)
        assert int(one.recurrent.block.ffn.expert_load.sum()) == 2 * IDS.numel() * 4


# ---- torch.jit.trace ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, dict(core_ffn="dense", injection="parcae"), dict(halting="freeze"), dict(halting="off")], ids=str
)
def test_a_traced_model_is_the_model(graded, fields, tmp_path):
    """Also for other tokens, whose positions halt at other loops."""
    _, fast = both(**fields)
    with torch.set_grad_enabled(graded):
        traced = torch.jit.trace(fast, (IDS,), check_trace=not fields)
        torch.jit.save(traced, tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert any(kind.startswith("openmythos::") for kind in kinds)
        for one, seed in ((traced, 1), (loaded, 2)):
            ids = tokens(2, 9, seed=seed)
            torch.testing.assert_close(one(ids), fast(ids), rtol=1e-4, atol=1e-4)
        if graded:
            traced(IDS).square().sum().backward()
            found = traced.embed.weight.grad.clone()
            fast.zero_grad()
            fast(IDS).square().sum().backward()
            assert relative(found, fast.embed.weight.grad) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fast", [False, True])
def test_a_trace_runs_all_loops(fast):
    """The traced example halts in the first loop, other inputs do not."""
    model = both(halt=3.0, core_ffn="dense")[fast]
    calls, (early, late) = [], (torch.tensor([[2, 3]]), torch.tensor([[5, 7]]))
    handle = model.recurrent.block.register_forward_pre_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        counts = [(calls.clear(), model(ids), len(calls))[-1] for ids in (early, late)]
        handle.remove()
        traced = torch.jit.trace(model, (early,), check_trace=False)
        for ids in (early, late):
            torch.testing.assert_close(traced(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert counts[0] < counts[1]
