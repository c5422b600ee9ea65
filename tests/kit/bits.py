"""The state of a model and its optimizer, bit for bit."""

from __future__ import annotations

import torch


def bits(model, optimizer=None):
    """Everything that loading a checkpoint could change, as comparable bytes."""
    found = {key: value.detach().flatten().view(torch.uint8).clone() for key, value in model.state_dict().items()}
    if optimizer is not None:
        state = optimizer.state_dict()
        for number, entries in state["state"].items():
            found.update({(number, key): value.clone().flatten().view(torch.uint8) for key, value in entries.items()})
        found["groups"] = torch.frombuffer(bytearray(repr(state["param_groups"]).encode()), dtype=torch.uint8)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
