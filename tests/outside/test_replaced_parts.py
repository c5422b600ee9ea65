"""If a part of a model is replaced, before or after `accelerate`, the replacement runs.

An op reads the weights of a part and never calls it. With a wrapper, a pruned or normalized weight or a quantized
layer, the code that calls the part must therefore run: with and without gradients, in prefill and in decode.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from openmythos_kernels import accelerate, report
from tests.kit.tiny import relative
from tests.outside.works import PACKAGES, decode, make, prompt, same_after

pytestmark = pytest.mark.filterwarnings("ignore")

ATTENTION = ("q_down", "q_norm", "q_up_nope", "q_up_rope", "kv_down", "kv_norm", "kv_up", "wo")
DENSE = ("gate", "up", "down")
LINEARS = (
    *(f"prelude.0.attn.{name}" for name in ATTENTION if "norm" not in name),
    "recurrent.block.attn.kv_up",
    "recurrent.block.attn.wo",
    *(f"prelude.0.ffn.{name}" for name in DENSE),
    "coda.0.ffn.down",
    "recurrent.block.ffn.router",
    *(f"recurrent.block.ffn.routed_experts.1.{name}" for name in DENSE),
    *(f"recurrent.block.ffn.shared_experts.0.{name}" for name in DENSE),
    "recurrent.act.halt",
    "recurrent.lora.down",
    "head",
)
NORMS = (
    "prelude.0.attn_norm",
    "prelude.0.ffn_norm",
    "prelude.0.attn.q_norm",
    "prelude.0.attn.kv_norm",
    "recurrent.block.attn_norm",
    "recurrent.block.attn.kv_norm",
    "recurrent.norm",
    "norm",
)
TABLES = ("recurrent.lora.scale", "embed")
WHOLE = (
    "prelude.0",
    "prelude.0.attn",
    "prelude.0.ffn",
    "recurrent",
    "recurrent.block",
    "recurrent.block.attn",
    "recurrent.block.ffn",
    "recurrent.block.ffn.routed_experts.1",
    "recurrent.block.ffn.shared_experts.0",
    "recurrent.act",
    "recurrent.lora",
    "coda.0.attn",
)


class Scaled(nn.Module):
    """A wrapper that can only call the module."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return _scaled(self.inner(*args, **kwargs))


class Adapter(nn.Module):
    """A low-rank addition to a linear layer; its `weight` is that of the base layer, as in adapter libraries."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(base.in_features, 2, generator=draw) * 0.3)
        self.b = nn.Parameter(torch.randn(2, base.out_features, generator=draw) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a @ self.b


class Negated(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def _scaled(out):
    return out * 1.25


def swap_in(model: nn.Module, path: str, make_part) -> None:
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, make_part(getattr(parent, name)))


def wrapper(model, path):
    swap_in(model, path, Scaled)


def adapter(model, path):
    swap_in(model, path, Adapter)


def pruned(model, path):
    prune.l1_unstructured(model.get_submodule(path), "weight", 0.4)


def weight_normed(model, path):
    part = model.get_submodule(path)
    parametrizations.weight_norm(part)
    with torch.no_grad():
        part.parametrizations.weight.original0.mul_(1.5)


def spectrally_normed(model, path):
    torch.manual_seed(0)  # it draws the vector that its power iteration starts from
    parametrizations.spectral_norm(model.get_submodule(path))


def parametrized(model, path):
    parametrize.register_parametrization(model.get_submodule(path), "weight", Negated())


def hooked(model, path):
    model.get_submodule(path).register_forward_hook(lambda module, args, out: _scaled(out))


def own_forward(model, path):
    part = model.get_submodule(path)
    inner = part.forward
    part.forward = lambda *args, **kwargs: _scaled(inner(*args, **kwargs))


def of_another_class(model, path):
    """Assigns a subclass to the module, as some libraries do."""
    part = model.get_submodule(path)
    base = type(part)
    part.__class__ = type(
        f"Other{base.__name__}",
        (base,),
        {"forward": lambda self, *args, **kw: _scaled(base.forward(self, *args, **kw))},
    )


CASES = [
    *(
        (change, path)
        for change in (wrapper, hooked, own_forward, of_another_class)
        for path in (*LINEARS, *NORMS, *TABLES, *WHOLE)
    ),
    *((change, path) for change in (adapter, spectrally_normed) for path in LINEARS),
    *((change, path) for change in (pruned, parametrized) for path in (*LINEARS, *NORMS, *TABLES)),
    *((weight_normed, path) for path in (*LINEARS, *TABLES)),
]
EVERY = [
    (change, path, package, order) for change, path in CASES for package in PACKAGES for order in ("before", "after")
]
# The most common changes, with each path once and packages and orders in turn, and one case of each other change that
# guards ask about; all others are slow.
QUICK = {
    case
    for i, case in enumerate(EVERY)
    if case[0] in (wrapper, adapter, pruned, weight_normed) and i % 4 == (i // 4 + i // 68) % 4
} | {
    (hooked, "recurrent.block.ffn.routed_experts.1.up", "openmythos", "before"),
    (own_forward, "prelude.0.attn.kv_up", "open_mythos", "after"),
    (own_forward, "recurrent.act.halt", "open_mythos", "before"),
    (of_another_class, "prelude.0.attn.wo", "openmythos", "after"),
}


@pytest.mark.parametrize(
    "change, path, package, order",
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_replaced_part_runs(change, path, package, order):
    model = same_after(lambda: make(package), lambda m: change(m, path), order)
    assert str(report(model))


PARAMETERS = [
    ("recurrent.injection", "log_A"),
    ("recurrent.injection", "log_dt"),
    ("recurrent.injection", "B"),
    ("recurrent.lora", "B"),
    ("recurrent.block.ffn", "router_bias"),
    ("recurrent.act.halt", "bias"),
]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("path, name", PARAMETERS)
def test_a_parametrized_parameter_is_used(path, name, package, order):
    def change(model):
        parametrize.register_parametrization(model.get_submodule(path), name, Negated())

    assert str(report(same_after(lambda: make(package), change, order)))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    "path", ["prelude.0.attn.kv_up", "recurrent.block.attn.wo", "recurrent.block.ffn.router", "coda.0.ffn.down"]
)
def test_dynamic_quantization(path, package, order):
    """Replaces one nn.Linear at a time. In a whole quantized model, some activations lie so close to the border between
    two of the 256 levels that the last bit decides, and a token goes to another expert."""

    def quantized(model):
        spec = {path: torch.ao.quantization.default_dynamic_qconfig}
        return torch.ao.quantization.quantize_dynamic(model, spec, dtype=torch.qint8, inplace=True)

    try:
        expected = prompt(quantized(make(package)))["logits"]
    except Exception as error:
        pytest.skip(f"the plain model does not support this: {type(error).__name__}: {error}")
    fast = accelerate(quantized(make(package))) if order == "before" else quantized(accelerate(make(package)))
    assert relative(prompt(make(package))["logits"], expected) > 1e-3  # quantization changes the logits
    assert relative(prompt(fast)["logits"], expected) < 1e-5
    assert all(torch.isfinite(step).all() for step in decode(fast).values())
    assert str(report(fast))
