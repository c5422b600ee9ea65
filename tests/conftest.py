import os

import pytest

# Before PyTorch loads OpenMP: a team whose threads spin while they wait is many times slower on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

pytest_plugins = ["tests.triton_on_cpu.plugin", "tests.kit.workers", "tests.kit.fixtures"]


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def upstream():
    """The public package that the reference is compared with."""
    from tests.kit.upstream import load_upstream  # not at import: the trees of tests.kit.other_processors lack it

    try:
        return load_upstream()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
