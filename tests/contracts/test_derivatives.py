"""Derivatives of ops beyond those of their kernels: computed by the op's formula, or refused with its name.

These are second and third derivatives, forward mode, batches and torch.func transforms.
"""

from functools import partial
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from openmythos_kernels.ops.op import Op
from openmythos_kernels.verify.check import with_leaves
from openmythos_kernels.verify.specs import specifications

pytestmark = pytest.mark.usefixtures("needs_extension")

CPU = torch.device("cpu")
OPS = [d for d in specifications() if "cpu" in d.backends]
SMOOTH = [d for d in OPS if d.differentiable]
REST = [
    d for d in OPS if not d.differentiable and d.name != "compact_active"
]  # compact_active has no floating-point input
REPEATED = {"moe_experts_backward_add", "moe_experts_backward_rows"}  # the module does not use it under transforms
DTYPES = {"float64": (torch.float64, 1e-9), "float32": (torch.float32, 2e-4)}
ONLY_LOW = {"mla_attention", "mla_linear", "mla_norm_rope"}  # ops without float64


def dtypes_of(specification):
    return [name for name in DTYPES if name == "float32" or specification.name not in ONLY_LOW]


PAIRS = [(d, name) for d in SMOOTH for name in dtypes_of(d)]
IDS = [f"{d.name}-{name}" for d, name in PAIRS]


def drawn(specification, dtype, case=0):
    sizes = list(specification.cases.values())[case]
    inputs = specification.make(sizes, dtype, CPU, torch.Generator().manual_seed(0))
    return {name: wide(x, dtype) for name, x in inputs.items()}


def wide(x, dtype):
    if isinstance(x, list):
        return [wide(item, dtype) for item in x]
    rotary = isinstance(x, torch.Tensor) and x.dim() >= 3 and x.shape[-1] == 2
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and not rotary else x


def smooth_loss(outputs):
    """A scalar that is nonlinear in every output."""
    floats = [y for name, y in outputs.items() if y.is_floating_point() and y.numel() and "without" not in name]
    return sum(
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sin().to(torch.float64).sum()
        for y in floats
    )


def close(a, b, tolerance, name=""):
    assert (a is None) == (b is None), name
    if a is not None:
        assert (a.double() - b.double()).norm() <= tolerance * max(float(b.double().norm()), 1e-12), name


def twice(call, inputs, wanted):
    inputs, leaves = with_leaves(inputs, wanted)
    first = torch.autograd.grad(
        smooth_loss(call(**inputs)), list(leaves.values()), create_graph=True, allow_unused=True
    )
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first if g is not None), list(leaves.values()), allow_unused=True
    )
    return first, second, list(leaves)


@pytest.mark.parametrize("specification, dtype", PAIRS, ids=IDS)
def test_second_derivatives(specification, dtype):
    dtype, tolerance = DTYPES[dtype]
    for case in range(len(specification.cases)):
        inputs = drawn(specification, dtype, case)
        if not all(x.numel() for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim() > 1):
            continue
        found, expected = (
            twice(call, inputs, specification.differentiable) for call in (specification.fast, specification.reference)
        )
        for order in (0, 1):
            for name, a, b in zip(found[2], found[order], expected[order]):
                if a is not None or b is not None:
                    zero = torch.zeros_like(a if b is None else b)
                    scale = max(float(b.detach().norm()) if b is not None else 0.0, 1e-9)
                    assert (
                        float(((zero if a is None else a) - (zero if b is None else b)).norm()) <= tolerance * scale
                    ), name


def test_third_derivatives():
    specification = next(d for d in SMOOTH if d.name == "rms_norm")
    inputs, results = drawn(specification, torch.float64), []
    for call in (specification.fast, specification.reference):
        given, leaves = with_leaves(inputs, specification.differentiable)
        value = smooth_loss(call(**given))
        for _ in range(3):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, list(leaves.values()), create_graph=True))
        results.append(value.detach())
    close(*results, 1e-9)


def of_first(specification, inputs, call):
    """The loss as a function of the first differentiable tensor alone, and that tensor."""
    name = specification.differentiable[0]
    return (lambda x: smooth_loss(call(**{**inputs, name: x}))), inputs[name]


@pytest.mark.parametrize("specification, dtype", [p for p in PAIRS if p[0].name not in REPEATED], ids=str)
def test_forward_mode_and_transforms(specification, dtype):
    """Forward mode by both interfaces, nested transforms, and transforms over single inputs."""
    dtype, tolerance = DTYPES[dtype]
    inputs = drawn(specification, dtype)
    wanted = [name for name in specification.differentiable if isinstance(inputs[name], torch.Tensor)]
    points = tuple(inputs[name] for name in wanted)
    directions = tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in points)

    def function(call):
        return lambda *given: smooth_loss(call(**{**inputs, **dict(zip(wanted, given))}))

    def dual(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, points, directions))).tangent

    every = tuple(range(len(points)))
    asked = {
        "dual tensors": dual,
        "jvp": lambda f: torch.func.jvp(f, points, directions)[1],
        "jvp without gradients": lambda f: torch.no_grad()(torch.func.jvp)(f, points, directions)[1],
        "grad": lambda f: torch.func.grad(f, every)(*points),
        "forward over reverse": lambda f: torch.func.jvp(torch.func.grad(f, every), points, directions)[1],
        "reverse over forward": lambda f: torch.func.grad(lambda *p: torch.func.jvp(f, p, directions)[1], every)(
            *points
        ),
        "reverse over reverse": lambda f: torch.func.grad(
            lambda *p: sum((g * d).sum() for g, d in zip(torch.func.grad(f, every)(*p), directions)), every
        )(*points),
        "hvp": lambda f: torch.autograd.functional.hvp(f, points, directions)[1],
        "autograd's jvp": lambda f: torch.autograd.functional.jvp(f, points, directions)[1],
    }
    for name, ask in asked.items():
        found, expected = (ask(function(call)) for call in (specification.fast, specification.reference))
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for i, (a, b) in enumerate(pairs):
            scale = max(float(b.norm()), 1e-9)
            assert float((a - b).norm()) <= tolerance * scale, f"{name}: {wanted[i]}"


# With experts, shapes depend on the routing, so PyTorch refuses, as it does for the reference.
@pytest.mark.parametrize(
    "specification, dtype", [p for p in PAIRS if p[0].name not in {"moe_experts", *REPEATED}], ids=str
)
def test_batches_of_gradients(specification, dtype):
    """A batch of gradients in one backward pass, as `torch.func.jacrev` and `is_grads_batched` make it."""
    dtype, tolerance = DTYPES[dtype]
    inputs = drawn(specification, dtype)
    results = []
    for call in (specification.fast, specification.reference):
        given, leaves = with_leaves(inputs, specification.differentiable[:1])
        y = next(y for y in call(**given).values() if y.requires_grad)
        many = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)])
        (leaf,) = leaves.values()
        results.append(torch.autograd.grad(y, leaf, many, is_grads_batched=True)[0])
    close(*results, tolerance)


@pytest.mark.parametrize("specification", REST, ids=str)
def test_ops_without_derivatives_raise_errors(specification):
    inputs = drawn(specification, specification.dtypes[0])
    name = next(
        name for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "freqs"
    )
    x = inputs[name]
    refused = partial(pytest.raises, RuntimeError, match=specification.name)
    with refused():
        specification.fast(**{**inputs, name: x.clone().requires_grad_()})
    with torch.no_grad():
        specification.fast(**{**inputs, name: x.clone().requires_grad_()})
        with refused(), forward_ad.dual_level():
            specification.fast(**{**inputs, name: forward_ad.make_dual(x, torch.ones_like(x))})
        with refused():
            torch.func.jvp(
                lambda x: next(iter(specification.fast(**{**inputs, name: x}).values())), (x,), (torch.ones_like(x),)
            )


@pytest.mark.parametrize("specification", [d for d in SMOOTH if d.name not in REPEATED], ids=str)
def test_forward_mode_through_the_dispatcher(specification):
    """Tangents also pass through `torch.ops.openmythos.<name>`."""
    dtype, tolerance = torch.float32, 2e-4
    inputs = drawn(specification, dtype)
    f, x = of_first(specification, inputs, specification.fast)
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    reference, _ = of_first(specification, inputs, specification.reference)
    expected = torch.func.jvp(reference, (x,), (direction,))[1]
    with mock.patch.object(Op, "__call__", lambda self, *args: self.overload(*args)):
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent, expected, tolerance)
        close(torch.func.jvp(f, (x,), (direction,))[1], expected, tolerance)
