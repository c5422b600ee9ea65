"""`openmythos train` under torchrun: the same losses as one process, whatever divides the model."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")

from openmythos.commands.parsing import write
from openmythos.parallel import Plan
from openmythos.training import PrepareConfig, prepare
from openmythos.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)
from openmythos.training.depth import DepthConfig
from openmythos.training.log import read
from openmythos.training.losses import LossConfig
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.run import run
from tests.kit.training import MODEL, write_text

STEPS = 20


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The configuration of a run, after one process has run it."""
    folder = tmp_path_factory.mktemp("ranks")
    prepare(PrepareConfig([str(write_text(folder / "source"))], str(folder / "shards"), held_out=0.3, progress=False))
    config = TrainConfig(
        out=str(folder / "alone"),
        steps=STEPS,
        batch=4,
        tokens=32,
        model=ModelConfig(**MODEL, act_threshold=0.9, halt_bias=-1.5),
        data=DataConfig(folder=str(folder / "shards")),
        depth=DepthConfig(sampling="poisson", mean=3, grad_loops="half"),
        checkpoint=CheckpointConfig(every=5),
        evaluation=EvaluationConfig(every=0, batches=2),
        log=LogConfig(progress=False, tensorboard=False),
    )
    run(config)
    return config


def torchrun(config, folder, ranks, *options, **more):
    write(config, folder / "config.toml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
        + ["-m", "openmythos", "train", str(folder / "config.toml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **more,
    )  # fmt: skip


def finished(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def losses(config, name="loss"):
    return {line["step"]: line[name] for line in read(Path(config.out)) if name in line}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == pytest.approx(expected[step], abs=1e-5), step


@pytest.mark.parametrize(
    "ranks, plan",
    [
        pytest.param(2, Plan(), marks=pytest.mark.slow),
        pytest.param(2, Plan(shard=2), marks=pytest.mark.slow),
        pytest.param(2, Plan(expert=2), marks=pytest.mark.slow),
        (2, Plan(shard=2, expert=2)),
        pytest.param(4, Plan(), marks=pytest.mark.slow),
        pytest.param(4, Plan(shard=2), marks=pytest.mark.slow),
        pytest.param(4, Plan(expert=4), marks=pytest.mark.slow),
        pytest.param(4, Plan(shard=2, expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_have_the_losses_of_one_process(alone, tmp_path, ranks, plan):
    config = replace(alone, out=str(tmp_path / "run"), parallel=plan)
    out = finished(torchrun(config, tmp_path, ranks))
    assert out.count("held-out loss") == 1
    assert_close(losses(config), losses(alone))


@pytest.fixture(scope="module")
def prior_alone(alone, tmp_path_factory):
    """The same of a run with terms over all loops: a prior on halting, and the balance of experts in a sequence."""
    config = replace(
        alone,
        out=str(tmp_path_factory.mktemp("prior") / "alone"),
        steps=8,
        model=ModelConfig(**MODEL, halting="off"),
        loss=LossConfig(chunk=50, prior_weight=0.1, balance_weight=0.1),
        optimizer=OptimizerConfig(lr=1e-2, warmup=0),
    )
    run(config)
    return config


@pytest.mark.parametrize(
    "ranks, plan",
    [
        (2, Plan()),
        pytest.param(2, Plan(shard=2), marks=pytest.mark.slow),
        pytest.param(2, Plan(expert=2), marks=pytest.mark.slow),
        pytest.param(2, Plan(shard=2, expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_have_the_same_terms_over_loops(prior_alone, tmp_path, ranks, plan):
    config = replace(prior_alone, out=str(tmp_path / "run"), parallel=plan)
    finished(torchrun(config, tmp_path, ranks))
    for name in ("loss", "prior", "balance", "expected_depth"):
        assert_close(losses(config, name), losses(prior_alone, name))


def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path):
    config = replace(alone, out=str(tmp_path / "run"), parallel=Plan(shard=2))
    process = torchrun(config, tmp_path, 2)
    while not any((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=120)
    again = replace(config, parallel=Plan())
    run(again)
    assert_close(losses(again), losses(alone))


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_goes_on(alone, tmp_path):
    config = replace(alone, out=str(tmp_path / "run"))
    process = torchrun(config, tmp_path, 2, "--max-restarts=2")
    while not any((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    finished(process)
    assert_close(losses(config), losses(alone))
