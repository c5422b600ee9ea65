import pytest
import torch

from openmythos_kernels import accelerate
from openmythos_kernels.serve.request import Request
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
    logits, sample = [], Request.sample

    def recorded(self, row):
        logits.append((self, row.clone()))
        return sample(self, row)

    monkeypatch.setattr(Request, "sample", recorded)
    return lambda handle: [row for request, row in logits if request is handle.request]
