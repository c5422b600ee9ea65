"""A fixture for tests of small models."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs a module's tests on one thread: handing work of tiny models to others costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
