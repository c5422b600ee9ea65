import pytest
import torch

from openmythos_kernels import accelerate
from openmythos_kernels.serve import engine, request
from tests.kit.tiny import tiny_model


@pytest.fixture(autouse=True)
def _extension(needs_extension):
    pass


@pytest.fixture
def served():
    """Makes accelerated models; the same arguments give the same weights."""

    def make(dtype=torch.float32, **fields):
        return accelerate(tiny_model(**fields).to(dtype))

    return make


@pytest.fixture
def seen(monkeypatch):
    """A function: handle -> the logits of each of its tokens."""
    logits, sample = [], request.sample_each

    def recorded(requests, rows):
        logits.extend(zip(requests, rows.clone()))
        return sample(requests, rows)

    for module in (request, engine):
        monkeypatch.setattr(module, "sample_each", recorded)
    return lambda handle: [row for asked, row in logits if asked is handle.request]
