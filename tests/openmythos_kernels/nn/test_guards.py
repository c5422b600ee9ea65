"""Guards: the obstacles to reading a part's weights instead of calling the part."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import openmythos
from openmythos.layers import RMSNorm
from openmythos_kernels import accelerate, report
from openmythos_kernels.nn.guards import kind_of, lent_whole, obstacle, own_methods
from tests.kit.tiny import relative, tiny_model, tokens


class Scaled(torch.Tensor):
    """A weight of a tensor subclass, like quantized and sharded weights."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (F.linear, torch.Tensor.mul, torch.Tensor.__mul__):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(2 * a.as_subclass(torch.Tensor) if type(a) is cls else a for a in args), **(kwargs or {}))


def doubled(part):
    """Replaces the weight of a part by one that counts twice."""
    part.weight = nn.Parameter(part.weight.detach().as_subclass(Scaled), requires_grad=False)
    return part


def test_a_plain_part_has_no_obstacle():
    assert obstacle("x", nn.Linear(2, 3, bias=False), nn.Linear) == "" and obstacle("x", RMSNorm(3), RMSNorm) == ""


OBSTACLES = {
    "a weight of a subclass": (lambda part: doubled(part), "Scaled"),
    "a flat shard": (lambda part: setattr(part, "weight", nn.Parameter(torch.zeros(6))), "1 dimensions"),
    "no weight": (lambda part: part._parameters.pop("weight"), "no weight"),
    "a forward of its own": (lambda part: setattr(part, "forward", lambda x: x), "forward of its own"),
    "a hook": (lambda part: part.register_forward_hook(lambda *a: None), "hooks"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_are_named(name):
    put, word = OBSTACLES[name]
    part = nn.Linear(2, 3, bias=False)
    put(part)
    assert word in obstacle("kv_up", part, nn.Linear) and "kv_up" in obstacle("kv_up", part, nn.Linear)


def test_flat_shards_are_no_obstacle_within_lent_whole():
    part = nn.Linear(2, 3, bias=False)
    part.weight = nn.Parameter(torch.zeros(6))
    with lent_whole():
        assert obstacle("x", part, nn.Linear) == ""
    assert obstacle("x", part, nn.Linear)


def test_methods_replaced_on_an_instance_are_noticed():
    model = accelerate(tiny_model())
    attention = model.prelude[0].attn
    attention.expand = attention.expand
    assert "expand" in own_methods("attn", attention, kind_of(attention)) and not attention.backend().fast


@pytest.mark.parametrize(
    "path",
    [
        "prelude.0.attn.kv_up",
        "prelude.0.attn_norm",
        "prelude.0.attn.q_norm",
        "prelude.0.ffn.up",
        "recurrent.block.ffn.router",
        "recurrent.block.ffn.routed_experts.1.gate",
        "recurrent.block.ffn.shared_experts.0.down",
        "recurrent.norm",
        "recurrent.lora.down",
        "coda.0.attn.wo",
    ],
)
def test_subclass_weights_keep_their_behavior(path):
    model = tiny_model()
    fast = accelerate(copy.deepcopy(model))
    ids = tokens(2, 9)
    before = model(ids)
    for m in (model, fast):
        doubled(m.get_submodule(path))
    with torch.no_grad():
        expected = model(ids)
        assert relative(expected, before) > 1e-3
        assert relative(fast(ids), expected) < 1e-5
        assert [row.name for row in report(fast)]
    assert relative(fast(ids), expected) < 1e-5


def test_generation_with_subclass_weights():
    model = tiny_model()
    fast = accelerate(copy.deepcopy(model))
    for m in (model, fast):
        doubled(m.prelude[0].attn.q_down)
    assert torch.equal(*(openmythos.generate(m, tokens(2, 5), 6, temperature=0) for m in (model, fast)))
