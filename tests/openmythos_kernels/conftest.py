import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _a_team():
    """How ops share their work among threads is a subject here, also where tests.kit.workers leaves a process one."""
    before = torch.get_num_threads()
    if before > 1:  # setting it again would tell the libraries of this thread what those of others do not hear
        yield
        return
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
