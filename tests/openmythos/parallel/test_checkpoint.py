"""Sharded checkpoints: whole or not there, and readable by any number of ranks."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openmythos import OpenMythos
from openmythos.parallel import Plan, checkpoint
from openmythos.training import load_model
from tests.kit.ranks import run_ranks
from tests.kit.tiny import tiny_config, tiny_model
from tests.openmythos.parallel.work import make, optimizer_of, train


def _first_half(rank: int, folder: str, plan: Plan, wait: bool):
    model = make(plan=plan)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    checkpoint.save(folder, model, optimizer, {"data": [3, "abc"]}, 3, wait=wait)
    rest = train(model, optimizer, range(3, 6))
    checkpoint.finish()
    return rest


def _second_half(rank: int, folder: str, plan: Plan):
    model = make(seed=99, plan=plan)
    optimizer = optimizer_of(model)
    extra = checkpoint.load(folder, model, optimizer)
    return extra, train(model, optimizer, range(extra["step"], 6))


def test_the_same_ranks_go_on_bit_for_bit(tmp_path):
    plan = Plan(shard=2, expert=2)
    expected = run_ranks(_first_half, str(tmp_path), plan, False)
    for rest, (extra, found) in zip(expected, run_ranks(_second_half, str(tmp_path), plan)):
        assert extra == {"data": [3, "abc"], "step": 3}
        assert found == rest


@pytest.mark.parametrize("plan", [Plan(), Plan(shard=2), pytest.param(Plan(expert=2), marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(tmp_path, plan):
    rest = run_ranks(_first_half, str(tmp_path), Plan(shard=2, expert=2), True)[0]
    if plan == Plan():
        results = [_second_half(0, str(tmp_path), plan)]
    else:
        results = run_ranks(_second_half, str(tmp_path), plan, ranks=2 if plan.shard == 2 else 4)
    for _, found in results:
        for (loss, norm), (expected, expected_norm) in zip(found, rest):
            assert loss == pytest.approx(expected, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_ranks_read_what_one_process_wrote(tmp_path):
    rest = _first_half(0, str(tmp_path), Plan(), False)
    for _, found in run_ranks(_second_half, str(tmp_path), Plan(expert=2)):
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in rest], abs=1e-5)


def test_an_asynchronous_save_writes_what_the_weights_were(tmp_path):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    checkpoint.save(tmp_path, model, None, {}, 1, wait=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    other = tiny_model(seed=1)
    checkpoint.load(tmp_path, other)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_the_last_n_stay_and_leftovers_go(tmp_path):
    model = tiny_model()
    (tmp_path / ".step-00000009.abc.part").mkdir()
    for step in (1, 2, 10, 10, 11):
        checkpoint.save(tmp_path, model, None, {}, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010.1", "step-00000011"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000011"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 1"):
        checkpoint.load(tmp_path, model, step=1)


def test_another_model_or_optimizer_is_one_clear_error(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path, model, optimizer, {}, 1)
    other = tiny_model(seed=5, dim=26)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"step-00000001: config.dim is 24, expected the model's 26"):
        checkpoint.load(tmp_path, other)
    assert all(map(torch.equal, before, other.parameters()))
    with pytest.raises(ValueError, match="optimizer: state of SGD, expected that of AdamW"):
        checkpoint.load(tmp_path, model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"holds no state of .*, expected that of the optimizer's group 0"):
        several = [{"params": [model.embed.weight]}]
        checkpoint.save(tmp_path, model, torch.optim.SGD(several, lr=0.1), {}, 2)
        checkpoint.load(tmp_path, model, optimizer)


def test_settings_of_groups_come_back_however_these_are_divided(tmp_path):
    model = tiny_model()
    parameters = list(model.parameters())
    parts = parameters[:5], parameters[5:9], parameters[9:]
    optimizer = torch.optim.SGD([{"params": p, "lr": lr} for p, lr in zip(parts, (0.5, 0.5, 0.25))], lr=1.0)
    checkpoint.save(tmp_path, model, optimizer, {}, 1)
    other = torch.optim.SGD([{"params": [*parts[0], *parts[1]]}, {"params": parts[2]}], lr=1.0)
    checkpoint.load(tmp_path, model, other)
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.25]
    with pytest.raises(ValueError, match="parameters of group 0 had different settings"):
        checkpoint.load(tmp_path, model, torch.optim.SGD(parameters, lr=1.0))


@pytest.mark.parametrize("file", [".metadata", "about.json", "extra.pt", "__0_0.distcp"])
def test_damage_is_one_clear_error(tmp_path, file):
    model = tiny_model()
    checkpoint.save(tmp_path, model, None, {}, 1)
    path = tmp_path / "step-00000001" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="step-00000001: damaged"):
        checkpoint.load(tmp_path, model)


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_one_file_and_back(tmp_path, name):
    model = tiny_model()
    checkpoint.save(tmp_path / "a", model, None, {}, 7)
    checkpoint.export(tmp_path / "a", tmp_path / name)
    checkpoint.import_(tmp_path / name, tmp_path / "b", step=8)
    other = tiny_model(seed=1)
    assert checkpoint.load(tmp_path / "b", other) == {"step": 8}
    for found in (other, load_model(tmp_path / name)):
        assert all(torch.equal(p, model.state_dict()[name]) for name, p in found.state_dict().items())


def _save_on_a_full_disk(folder: str) -> str:
    """A second checkpoint of three times the size that files may have."""
    checkpoint.save(folder, tiny_model(), None, {}, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        checkpoint.save(folder, tiny_model(), None, {}, 2)
    except OSError as error:
        return str(error)
    return "saved"


def test_a_full_disk_is_one_clear_error_and_older_checkpoints_stay(tmp_path):
    code = f"import {__name__} as t; print(t._save_on_a_full_disk({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "no checkpoint was saved, older ones are as they were" in done.stdout, done
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(tmp_path, tiny_model()) == {"step": 1}


def _save_for_ever(folder: str) -> None:
    model = OpenMythos(tiny_config(dim=128, vocab_size=5000))
    optimizer = optimizer_of(model)
    step = 0
    while True:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        for p in model.parameters():
            optimizer.state[p] = {"exp_avg": torch.full_like(p, step)}
        checkpoint.save(folder, model, optimizer, {"number": step}, step, keep=2, wait=bool(step % 2))
        step += 1
        print(step, flush=True)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_a_readable_newest_checkpoint(tmp_path, kills):
    draw = random.Random(kills)
    code = f"import {__name__} as t; t._save_for_ever({str(tmp_path)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    model = OpenMythos(tiny_config(dim=128, vocab_size=5000))
    optimizer = optimizer_of(model)
    partly = 0
    for _ in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        assert writer.stdout is not None
        for _ in range(2):
            assert writer.stdout.readline()
        time.sleep(draw.uniform(0, 0.3))
        writer.kill()
        writer.wait()
        partly += any(path.name.startswith(".") for path in Path(tmp_path).iterdir())
        extra = checkpoint.load(tmp_path, model, optimizer)
        for p in model.parameters():
            assert (p == extra["number"]).all()
            assert (optimizer.state[p]["exp_avg"] == extra["number"]).all()
    assert partly or kills < 20  # some were killed while they wrote
