import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models of a few thousand weights lose more by handing work to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
