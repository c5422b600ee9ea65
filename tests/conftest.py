import pytest
import torch

from tests.kit.upstream import load_upstream

pytest_plugins = ["tests.triton_on_cpu.plugin", "tests.kit.workers"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def upstream():
    """The public package that the reference is judged against."""
    try:
        return load_upstream()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
