"""Runs of a model so small that a step is all overhead, disturbed in every way."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openmythos.training import PrepareConfig, load_model, prepare
from openmythos.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    PrecisionConfig,
    TrainConfig,
)
from openmythos.training.depth import DepthConfig
from openmythos.training.log import read
from openmythos.training.losses import LossConfig
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.run import Diverged, run
from tests.kit.training import MODEL as SMALLEST
from tests.kit.training import write_text

MODEL = dict(SMALLEST, dropout=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare(PrepareConfig([str(write_text(folder / "source"))], str(folder / "shards"), held_out=0.3, progress=False))
    return folder / "shards"


@pytest.fixture
def config(text, tmp_path):
    return TrainConfig(
        out=str(tmp_path / "run"),
        steps=8,
        batch=4,
        tokens=32,
        model=ModelConfig(**MODEL),
        data=DataConfig(folder=str(text)),
        depth=DepthConfig(sampling="poisson", mean=3, grad_loops="half"),
        loss=LossConfig(ponder_weight=0.01),
        optimizer=OptimizerConfig(warmup=2, ema=0.9),
        checkpoint=CheckpointConfig(every=2),
        evaluation=EvaluationConfig(every=4, batches=2),
        log=LogConfig(progress=False, tensorboard=False, routing_every=4),
    )


def numbers(out):
    """What the log says of each step but times."""
    timed = ("tokens_per_second", "seconds", "mfu")
    return [{k: v for k, v in line.items() if k not in timed} for line in read(out)]


def weights(out):
    return load_model(out / "model.pt").state_dict()


def assert_same(a, b):
    assert numbers(a) == numbers(b)
    mine, other = weights(a), weights(b)
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def test_a_run_leaves_a_log_checkpoints_and_a_model(config):
    result = run(config)
    assert (result.steps, result.finished) == (8, True)
    lines = read(result.out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["tokens"] == 8 * 4 * 32 and steps[-1]["flops"] > 0 and steps[-1]["ponder"] >= 1
    depth, routing = steps[3]["routing"].values()
    assert 1 <= depth <= 3
    assert len(routing["overlap"]) + 1 == len(routing["entropy"]) in (2, 3)  # ACT may end before the third loop
    assert lines[-1] == {"step": 8, "held_out": result.held_out}
    assert json.loads((result.out / "config.json").read_text())["steps"] == 8
    assert len(list((result.out / "checkpoints").iterdir())) == 2
    assert weights(result.out)


def test_fast_and_reference_modules_train_alike(config, tmp_path):
    fast, slow = (run(replace(config, fast=fast, out=str(tmp_path / str(fast)))) for fast in (True, False))
    assert fast.held_out == pytest.approx(slow.held_out, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": OptimizerConfig(name="muon", warmup=2, schedule="wsd")},
        {"precision": PrecisionConfig(mode="autocast"), "memory": MemoryConfig(True, True), "accumulate": 2},
        {"precision": PrecisionConfig(mode="bf16"), "depth": DepthConfig(sampling="uniform", mean=3, per="batch")},
        {"model": ModelConfig(**MODEL | {"dropout": 0.0}, kind="dense", n_layers=2), "loss": LossConfig(z_weight=1e-4)},
    ],
    ids=["adamw", "muon", "autocast", "bf16", "dense"],
)
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, changes, monkeypatch):
    whole = replace(config, **changes)
    run(whole)
    stopped = replace(whole, out=str(tmp_path / "stopped"))

    from openmythos.training.trainer import Trainer

    step = Trainer.step

    def interrupted(self, number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        first = run(stopped)
    assert (first.steps, first.finished) == (5, False)
    assert run(stopped).finished
    assert_same(tmp_path / "run", tmp_path / "stopped")


def child(config):
    torch.set_num_threads(1)
    run(config)


def killed_run(config, moments):
    """Runs `config` in processes that are killed after these seconds each, then once to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openmythos.training.run", "openmythos_kernels"])
    for moment in [*moments, None]:
        process = context.Process(target=child, args=(config,))
        process.start()
        process.join(moment)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    return process.exitcode


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(config, tmp_path, kills):
    whole = replace(config, steps=24, checkpoint=CheckpointConfig(every=1), evaluation=EvaluationConfig(0, 1))
    began = time.perf_counter()
    assert killed_run(whole, []) == 0
    length = time.perf_counter() - began
    rng = random.Random(kills)
    # Moments within a run's length each, so that some kills come before the first step and some in the last.
    moments = [rng.uniform(0.2, 0.5) * length for _ in range(kills)]
    killed = replace(whole, out=str(tmp_path / "killed"))
    assert killed_run(killed, moments) == 0
    assert_same(tmp_path / "run", tmp_path / "killed")


def test_another_configuration_does_not_go_on_in_the_same_folder(config):
    run(replace(config, steps=2))
    with pytest.raises(ValueError, match=r"holds another run: depth.mean was 3, is 4; steps was 2, is 8"):
        run(replace(config, depth=replace(config.depth, mean=4)))
    with pytest.raises(ValueError, match=r"resume = False: .* holds checkpoints"):
        run(replace(config, steps=2, resume=False))


def test_a_finished_run_is_finished(config):
    first, second = run(config), run(config)
    assert (second.steps, second.held_out) == (8, first.held_out)


def test_a_step_that_is_not_finite_is_skipped_and_counted(config, monkeypatch):
    from openmythos.training import trainer

    real = trainer.losses

    def losses(model, inputs, targets, loss, step=-1, **depth):
        total, parts = real(model, inputs, targets, loss, step, **depth)
        return (total * float("nan") if step in (3, 4) else total), parts

    monkeypatch.setattr(trainer, "losses", losses)
    result = run(config)
    steps = [line for line in read(result.out) if "loss" in line]
    assert [line["skipped"] for line in steps] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert all(torch.isfinite(p).all() for p in weights(result.out).values() if p.is_floating_point())


def test_a_diverged_run_ends_and_keeps_its_last_good_checkpoint(config, monkeypatch):
    from openmythos.training import trainer

    real = trainer.losses

    def losses(model, inputs, targets, loss, step=-1, **depth):
        total, parts = real(model, inputs, targets, loss, step, **depth)
        return (total * float("inf") if step >= 3 else total), parts

    monkeypatch.setattr(trainer, "losses", losses)
    with pytest.raises(Diverged, match=r"step 6: 3 steps in a row .* the newest checkpoint is .*2$"):
        run(replace(config, patience=3))
    monkeypatch.undo()
    assert run(replace(config, patience=3)).finished


def test_a_vocabulary_that_is_too_small_is_known_before_training(config):
    with pytest.raises(ValueError, match=r"vocab_size"):
        run(replace(config, model=ModelConfig(**MODEL | {"vocab_size": 100})))


def test_text_of_another_tokenizer_is_refused(config):
    wrong = replace(config, data=replace(config.data, tokenizer="tiktoken:gpt2"))
    with pytest.raises(ValueError, match=r"data.tokenizer = 'tiktoken:gpt2': .* was prepared with 'bytes'"):
        run(wrong)


def test_damaged_shards_are_known_before_training(config, text, tmp_path):
    shutil.copytree(text, folder := tmp_path / "shards")
    path = sorted(folder.glob("train-*.bin"))[0]
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000.bin: damaged: its checksum is \d+, not \d+"):
        run(replace(config, data=replace(config.data, folder=str(folder))))
    assert not (Path(config.out) / "log.jsonl").exists()


def test_a_checkpoint_of_another_model_is_known_before_training(config):
    """The folder's config.json would say so first."""
    whole = replace(config, steps=2)
    out = run(whole).out
    (out / "config.json").unlink()
    before = (out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"step-00000002: config.expert_dim is 16, expected the model's 24"):
        run(replace(whole, model=ModelConfig(**MODEL | {"expert_dim": 24})))
    assert (out / "log.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_known_before_training(config):
    whole = replace(config, steps=2)
    out = run(whole).out
    (out / "checkpoints" / "step-00000002" / "extra.pt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"step-00000002: damaged"):
        run(replace(whole))


FULL_DISK = """
import resource, signal, sys
from openmythos.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.argv = ["openmythos", "train", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_line_and_status_1(config, tmp_path, asynchronous):
    pytest.importorskip("jsonargparse")
    from openmythos.commands.parsing import write

    file = tmp_path / "config.toml"
    write(replace(config, checkpoint=replace(config.checkpoint, asynchronous=asynchronous)), file)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(file)], capture_output=True, text=True)
    assert done.returncode == 1, done
    said = done.stderr.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("openmythos train: ") and "File too large" in said[0], done.stderr
    assert "no checkpoint was saved, older ones are as they were" in said[0]
    assert list((Path(config.out) / "checkpoints").iterdir()) == []
