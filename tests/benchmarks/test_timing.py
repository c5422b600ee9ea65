"""Sampling and statistics, with a fake clock."""

import pytest
import torch

from benchmarks.timing import Clock, Lap, interleave, speedup, spread


class Time:
    """A clock that only laps advance."""

    def __init__(self):
        self.now = 0.0

    def __call__(self, call):
        start = self.now
        call()
        return self.now - start

    def lap(self, seconds, log=None, name="", reset_costs=0.0):
        def run():
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
            if log is not None:
                log.append(name)

        def reset():
            self.now += reset_costs

        return Lap(run, reset)


def sample(time, laps, **options):
    options = {"least": 3, "most": 3, "budget_s": 0.0, "now": lambda: time.now, **options}
    return interleave(laps, time, **options)


def test_every_contender_runs_once_per_round_and_rounds_start_with_each_in_turn():
    time, log = Time(), []
    sample(time, {name: time.lap(1.0, log, name) for name in "abc"}, warmup=0)
    assert log == list("abcbcacab")


def test_warmup_rounds_are_not_sampled():
    time = Time()
    samples = sample(time, {"a": time.lap(iter((9.0, 1.0, 2.0, 3.0)))}, warmup=1)
    assert samples == {"a": [1.0, 2.0, 3.0]}


def test_reset_follows_every_run_and_is_not_timed():
    time = Time()
    assert sample(time, {"a": time.lap(1.0, reset_costs=5.0)}) == {"a": [1.0, 1.0, 1.0]}
    assert time.now == 4 * 6.0


@pytest.mark.parametrize("budget, rounds", [(0.0, 2), (4.5, 5), (100.0, 7)])
def test_sampling_stops_after_the_budget_but_not_before_the_least_rounds(budget, rounds):
    time = Time()
    samples = sample(time, {"a": time.lap(1.0)}, least=2, most=7, budget_s=budget, warmup=0)
    assert len(samples["a"]) == rounds


def test_tick_follows_every_turn():
    time, ticks = Time(), []
    sample(time, {"a": time.lap(1.0), "b": time.lap(1.0)}, warmup=1, tick=lambda: ticks.append(1))
    assert len(ticks) == 8


def test_speedup_is_a_ratio_within_rounds_so_that_drift_cancels():
    # The machine becomes three times slower, but in every round one contender takes twice as long as the other.
    slow, fast = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    assert speedup(slow, fast) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}


def test_spread_is_median_and_range():
    assert spread([3.0, 1.0, 100.0]) == {"median": 3.0, "low": 1.0, "high": 100.0, "n": 3}


def test_clock_measures_wall_time_on_a_cpu(monkeypatch):
    ticks = iter((10.0, 12.5))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert Clock(torch.device("cpu"))(lambda: None) == 2.5
