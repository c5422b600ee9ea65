import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _a_team():
    """How ops share their work among threads is a subject here, also where tests.kit.workers leaves a process one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
