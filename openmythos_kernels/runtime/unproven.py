"""The switch `OPENMYTHOS_UNPROVEN=1`: GPU kernels that pass every check without a GPU, but that no GPU has run yet.

`csrc/cuda/torch.h` reads the same switch. A measurement on a GPU makes such a kernel the default, or deletes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "OPENMYTHOS_UNPROVEN"


def allowed() -> bool:
    return os.environ.get(SWITCH) == "1"


@contextmanager
def allowing() -> Iterator[None]:
    """Runs unproven kernels inside, for tests and benchmarks. The switch belongs to the process, not to a thread."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
