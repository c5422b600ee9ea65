"""Experiments that compute nothing worth knowing, for tests of the machinery."""

import os
import signal
import time

from openmythos.lab.experiment import Experiment, Run, Verdict

FACTOR = 2


def compute(settings, tick):
    tick(1, 2)
    if settings.get("fails"):
        raise ArithmeticError("it diverged")
    if settings.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(settings.get("sleep", 0))
    for i in range(settings.get("sleeps", 0)):
        time.sleep(0.6)
        tick(i, settings["sleeps"])
    return {"value": FACTOR * settings["seed"], "threads": _threads()}


def _threads():
    import torch

    return torch.get_num_threads()


def runs(settings, seeds):
    return [Run(f"seed{seed}", {**settings, "seed": seed}, compute) for seed in seeds]


def judge(settings, results):
    values = [result.found["value"] for result in results]
    outcome = "holds" if max(values) >= settings.get("least", 0) else "rejected"
    return Verdict(
        outcome,
        f"the largest value is {max(values)} < & >",
        {"largest": max(values), "missing": float("nan")},
        ("seed", "value"),
        [(result.settings["seed"], float(result.found["value"])) for result in results],
    )


def draw(settings, results, axes):
    axes.plot([result.found["value"] for result in results], "o")
    axes.set_xlabel("seed")


def experiment(name="doubling", number="E1", seeds=3, **settings):
    return Experiment(
        name=name,
        number=number,
        title="Doubling <numbers>",
        claim="Twice a number is larger & not smaller.",
        rule="No doubled number exceeds its number.",
        limits="Anything else.",
        scales={"smoke": settings, "small": settings},
        seeds=seeds,
        runs=runs,
        judge=judge,
        draw=draw,
    )
