import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _a_team():
    """Two threads at least, since these tests are also about teams, and tests.kit.workers leaves a process one."""
    before = torch.get_num_threads()
    if before > 1:  # already a team; setting the number again would reach only the libraries of this thread
        yield
        return
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
