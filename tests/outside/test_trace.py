"""torch.jit.trace, also by TensorBoard's graph: the trace computes the same, or an error says that it cannot."""

from __future__ import annotations

import pytest
import torch

from openmythos_kernels import accelerate
from tests.kit.tiny import tokens
from tests.outside.installed import need
from tests.outside.works import IDS, PACKAGES, make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_trace_computes_the_same_or_is_refused(package, gradients):
    model = accelerate(make(package))
    with torch.set_grad_enabled(gradients):
        try:
            traced = torch.jit.trace(model, IDS, check_trace=False)
        except (NotImplementedError, RuntimeError) as error:
            assert "trac" in str(error).lower(), str(error)  # the error mentions tracing
            return
        other = tokens(2, 9, seed=3)
        torch.testing.assert_close(traced(other), make(package)(other), rtol=1e-5, atol=1e-5)


def test_tensorboards_graph(tmp_path):
    need("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    model = accelerate(make("open_mythos"))
    with SummaryWriter(str(tmp_path)) as writer:
        try:
            writer.add_graph(model, IDS)
        except (NotImplementedError, RuntimeError) as error:
            assert "trac" in str(error).lower(), str(error)
    model(IDS)
