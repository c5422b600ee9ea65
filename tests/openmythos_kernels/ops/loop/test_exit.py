"""The exit counter: it learns late that no position runs, and never early."""

import pytest
import torch

from openmythos.recurrence import ACTState, act_update
from openmythos_kernels.ops.loop import ExitCounter, compact_active


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_exit_counter_answers_late_and_never_early(lag):
    counter = ExitCounter(lag)
    count = torch.tensor([5])  # one tensor, overwritten: the counter must have copied it
    answers = []
    for running in (5, 3, 1, 0, 0, 0, 0, 0):
        counter.record(count.fill_(running))
        answers.append(counter.finished())
    assert answers == [i >= 3 + lag for i in range(8)]


def test_exit_counter_before_any_record_and_with_a_wrong_lag():
    assert not ExitCounter(0).finished()
    with pytest.raises(ValueError, match="lag = -1"):
        ExitCounter(-1)


def test_a_late_exit_changes_nothing():
    """Loops after the last position has halted have weight zero, so the output has the same bits for any lag."""
    torch.manual_seed(0)
    states, p = torch.randn(12, 2, 5, 4), torch.rand(12, 2, 5)

    def run(lag):
        state, counter = ACTState.start(states[0]), ExitCounter(lag)
        for t in range(12):
            state = act_update(state, states[t], p[t], t, 0.9, False)
            counter.record(compact_active(state.running).total)
            if counter.finished():
                return state, t
        return state, 12

    results = [run(lag) for lag in (0, 1, 3)]
    assert [t - results[0][1] for _, t in results] == [0, 1, 3] and results[-1][1] < 11
    for state, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, results[0][0]))
