"""A step's graph goes with its loss: what holds it in a cycle would stay for the life of the process."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from openmythos_kernels import accelerate
from tests.kit.thresholds import set_threshold
from tests.kit.tiny import tiny_model, tokens

MODELS = {
    "evolve": {},
    "freeze": dict(halting="freeze"),
    "without halting": dict(halting="off"),
    "grouped-query": dict(attn_type="gqa"),
    "grouped-query, freeze": dict(attn_type="gqa", halting="freeze"),
    "dense loop": dict(core_ffn="dense"),
    "two layers in the loop": dict(core_layers=2),
    "concat": dict(injection="concat"),
    "parcae": dict(injection="parcae"),
    "residual": dict(injection="residual"),
    "dropout": dict(dropout=0.1),
}
CALLS = {
    "": {},
    "exit": dict(exit="latent"),
    "last loops": dict(grad_loops=2),
    "checkpoints": dict(checkpoint_loops=True),
}
CASES = [
    pytest.param(fields, options, id=f"{model} {call}".strip())
    for model, fields in MODELS.items()
    for call, options in CALLS.items()
    if not ("freeze" in model and call == "checkpoints")  # refused: keys outlive a loop
]


class Object:
    """Something that a weak reference can point at."""


class Canary(torch.autograd.Function):
    """The identity; its node, which every later node holds, holds an object."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.object = Object()
        seen.append(weakref.ref(ctx.object))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, None


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("fields, options", CASES)
def test_a_graph_goes_with_its_loss(fields, options, recompute, backward, monkeypatch):
    set_threshold(monkeypatch, "mla_recompute", 0 if recompute else 1 << 30)
    model = accelerate(tiny_model(**fields)).train()
    seen = []
    model.embed.register_forward_hook(lambda module, arguments, x: Canary.apply(x, seen))
    ids = tokens(2, 7)
    loss = F.cross_entropy(model(ids, **options).flatten(0, 1), ids.flatten())
    assert seen[0]() is not None
    if backward:
        loss.backward()
    del loss
    assert seen[0]() is None
