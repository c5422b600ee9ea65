"""pytest: fixtures for tests of every folder."""

import pytest


@pytest.fixture(scope="session")
def needs_extension():
    """Fails, instead of testing the fallback, where the extension is not loaded."""
    from openmythos_kernels.runtime import extension

    assert extension.module is not None, extension.reason


@pytest.fixture
def always_recompute(monkeypatch):
    """Attention recomputes keys and values in the backward of calls of any size, not only of large ones."""
    from tests.kit.thresholds import set_threshold

    set_threshold(monkeypatch, "mla_recompute", 0)
