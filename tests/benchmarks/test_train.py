"""The control of the training suite."""

import copy

import torch

from benchmarks.contenders import Contender
from benchmarks.suites.train import nudged
from tests.kit.tiny import tiny_model


def test_the_controls_weights_are_one_ulp_apart():
    model = tiny_model()
    moved = nudged(Contender("reference", copy.deepcopy(model))).model
    for a, b in zip(model.parameters(), moved.parameters()):
        assert (b > a).all()
        assert torch.equal(torch.nextafter(b, torch.full_like(b, -torch.inf)), a)
