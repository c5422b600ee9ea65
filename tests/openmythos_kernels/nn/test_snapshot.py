"""A snapshot of a model sees every change of what it consists of."""

import pytest
import torch
from torch import nn

from openmythos_kernels.nn.snapshot import Snapshot
from tests.kit.tiny import tiny_model


def last_with(model, table):
    """The last module whose table of parts is not empty: nothing comes behind what is added to it."""
    return [module for module in model.modules() if getattr(module, table)][-1]


CHANGES = {
    "nothing": lambda model: None,
    "a parameter more, the last one": lambda model: last_with(model, "_parameters").register_parameter(
        "more", nn.Parameter(torch.zeros(1))
    ),
    "the first module of a list": lambda model: model.prelude.append(nn.Identity()),
    "a module more": lambda model: model.recurrent.add_module("more", nn.Identity()),
    "a module less": lambda model: model.coda.pop(0),
    "another module": lambda model: setattr(model.recurrent, "norm", nn.Identity()),
    "another weight": lambda model: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach().clone())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    model = tiny_model(prelude_layers=0)
    snapshot = Snapshot(model)
    CHANGES[name](model)
    assert snapshot.unchanged(model) == (name == "nothing")
