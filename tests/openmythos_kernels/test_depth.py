import pytest
import torch

from openmythos_kernels import accelerate
from openmythos_kernels.depth import depth_stats
from tests.kit.tiny import tiny_model, tokens


@pytest.mark.parametrize("fast", [False, True])
def test_exit_depths_are_those_of_the_ponder_cost(fast):
    model = tiny_model(act_threshold=0.8, max_loop_iters=6)
    model = accelerate(model) if fast else model
    with depth_stats(model) as stats:
        _, ponder = model(tokens(3, 7), return_ponder=True)
    depths = (ponder.ceil() - 1).long().flatten()  # N + R with 0 < R <= 1
    assert stats.histogram == torch.bincount(depths)[1:].tolist() and len(set(depths.tolist())) > 1
    assert stats.mean_depth == pytest.approx(depths.double().mean().item())
    assert "mean" in str(stats) and "step" not in vars(model.recurrent)
    assert 0 <= stats.saved(6) < 1
    if fast:
        assert stats.saved(6) >= 1 - depths.max().item() / 6


def test_nothing_to_watch():
    for model in (torch.nn.Linear(2, 2), tiny_model(halting="off")):
        with pytest.raises(ValueError, match="no recurrent block with halting"), depth_stats(model):
            pass
