"""The file of measured configurations, and measuring, with a fake clock and a fake device."""

import json

import pytest

from openmythos_kernels.ops.mla import configs, tune
from openmythos_kernels.runtime import target, tuning


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENMYTHOS_CACHE", str(tmp_path))
    tuning._choices.cache_clear()
    yield
    tuning._choices.cache_clear()


class Clock:
    """Time that passes only when something is measured."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def measuring(clock, seconds):
    """A measurement that takes the time that `seconds` lists for the configuration being tried."""

    def measure(call):
        took = seconds[call()]
        if took is None:
            raise RuntimeError("out of shared memory")
        clock.now += took
        return took

    return measure


def job(what, candidates):
    return tuning.Job(what, candidates, lambda: tuning.chosen(what))


def test_the_fastest_is_stored_and_chosen_on_that_device_alone(monkeypatch):
    clock, lines = Clock(), []
    seconds = {(1, 1): 2.0, (2, 2): 1.0, (3, 3): None}
    found = tuning.tune(
        [job("a", list(seconds))], 60, name="GPU A", measure=measuring(clock, seconds), clock=clock, say=lines.append
    )
    assert found == {"a": (2, 2)} and any("[1/1] a" in line for line in lines)
    tuning._choices.cache_clear()  # as a new process would
    monkeypatch.setattr(tuning, "device", lambda: "GPU A")
    assert tuning.chosen("a") == (2, 2) and tuning.chosen("b") is None
    monkeypatch.setattr(tuning, "device", lambda: "GPU B")
    assert tuning.chosen("a") is None


def test_the_time_limit_keeps_what_is_finished():
    clock, lines = Clock(), []
    seconds = {(n,): 4.0 for n in range(5)}
    jobs = [job("a", [(0,), (1,)]), job("b", [(2,), (3,)])]
    found = tuning.tune(jobs, 10, name="GPU", measure=measuring(clock, seconds), clock=clock, say=lines.append)
    assert found == {"a": (0,)} and "1 of 2" in lines[-1]
    assert json.loads(tuning.path().read_text()) == {"GPU": {"a": [0]}}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"GPU": 3}', '{"GPU": {"a": "x"}}'])
def test_a_broken_file_counts_as_empty(text, monkeypatch):
    monkeypatch.setattr(tuning, "device", lambda: "GPU")
    tuning.path().write_text(text)
    assert tuning.chosen("a") is None
    tuning.store("GPU", "a", (1, 2))
    assert tuning.chosen("a") == (1, 2)


def test_launches_take_the_choice_before_their_table_but_not_when_compiling_for_another(monkeypatch):
    table = configs.attention("forward", 2, 64, 32, 64)
    tuning.store("GPU", "mla_attention forward 2 64 32 64", (16, 16, 2, 1))
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda: "GPU")
    assert configs.attention("forward", 2, 64, 32, 64) == (16, 16, 2, 1)
    with target.targeting(target.TARGETS["sm_80"]):
        assert configs.attention("forward", 2, 64, 32, 64) == table


def test_what_latent_attention_tunes_is_what_its_launches_ask_for(monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "chosen", lambda what: asked.append(what))
    jobs = tune.jobs("meta", tokens=64, cached=256, rows=1)
    for nope, rope, v in ((64, 32, 64), (128, 64, 128)):
        for kernel in configs.KERNELS:
            configs.attention(kernel, 2, nope, rope, v)
    for heads, r in ((16, 256), (128, 1024)):
        configs.latent(2, heads, r)
    assert set(asked[-8:]) <= {job.what for job in jobs}
    assert all(len(job.candidates) > 1 for job in jobs)
