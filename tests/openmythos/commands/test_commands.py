"""Every command as a user gives it, on a model that trains in seconds."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("jsonargparse")

from openmythos import __main__ as entry
from openmythos.commands import COMMANDS
from openmythos.commands.parsing import write
from openmythos.training.config import EvaluationConfig, LogConfig, ModelConfig, TrainConfig
from tests.kit.training import MODEL, write_text

CONFIG = TrainConfig(
    steps=6,
    batch=4,
    tokens=32,
    model=ModelConfig(**MODEL, halting="off"),
    evaluation=EvaluationConfig(batches=1),
    log=LogConfig(tensorboard=False, progress=False),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    write_text(folder / "text")
    write(CONFIG, folder / "small.toml")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["openmythos", *map(str, arguments)])
    entry.main()


def test_from_text_to_words(place, monkeypatch, capsys):
    command(monkeypatch, "prepare", "text", "out=data", "held_out=0.3", "progress=false")
    assert "data: 40 documents, tokens: " in capsys.readouterr().out
    command(monkeypatch, "train", "small.toml", "out=run", "data.folder=data")
    assert "6 steps, held-out loss" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    command(monkeypatch, "eval", "run", "loops=[1,2,3,4]", "batches=1", "batch=2")
    out = capsys.readouterr().out
    assert "loss = " in out and (place / "run" / "loops.png").exists() and (place / "run" / "loops.json").exists()
    command(monkeypatch, "fit-halting", "run", "out=fitted", "batches=1", "batch=2", "loops=3")
    assert re.search(r"loss +\d.* with exit=head after \d\.\d\d", capsys.readouterr().out)
    command(monkeypatch, "eval", "fitted", "loops=[1,3]", "batches=1", "batch=2", "exit=head")
    assert re.search(r"mean depth\n +1  .*  1\.00\n +3  ", capsys.readouterr().out)
    command(monkeypatch, "generate", "fitted", "prompt=loop", "tokens=4", "exit=head")
    assert capsys.readouterr().out.startswith("loop")
    command(monkeypatch, "plot", "run", "out=loss.png")
    assert (place / "loss.png").exists()
    capsys.readouterr()
    command(monkeypatch, "generate", "run", "prompt=loop", "tokens=8", "temperature=0")
    first = capsys.readouterr().out
    command(monkeypatch, "generate", "run", "prompt=loop", "tokens=8", "temperature=0", "fast=false")
    assert first.startswith("loop") and capsys.readouterr().out == first


def test_a_dry_run_allocates_and_writes_nothing(place, monkeypatch, capsys):
    command(monkeypatch, "train", "mythos_3b", "--dry-run", "16", "parallel.shard=8", "out=nothing")
    out = capsys.readouterr().out
    for words in ("parameters", "bytes per rank", "optimizer", "activations", "time of a step"):
        assert words in out
    assert not (place / "nothing").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "COMMAND = trian: must be one of train"),
        (["train", "small.toml", "depth.men=3"], "openmythos train: depth.men: no such key, did you mean depth.mean"),
        (["train", "small.toml", "tokens=65"], "tokens = 65: must be <= model.max_seq_len = 64"),
        (["train", "nowhere.toml"], "CONFIG = 'nowhere.toml': no such file, nor one of .*tiny"),
        (["eval", "nowhere"], "RUN = nowhere: holds no config.json"),
        (["generate"], "usage: openmythos generate RUN"),
        (["plot"], "usage: openmythos plot RUN"),
        (["sizes", "mythos_2b"], "NAME = mythos_2b: must be one of"),
        (["prepare", "nowhere", "out=x"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(place, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2 and re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, name):
    try:
        command(monkeypatch, name, "--help")
    except SystemExit as left:
        assert left.code == 0
    assert len(capsys.readouterr().out) > 60


def test_the_list_of_commands(monkeypatch, capsys):
    command(monkeypatch)
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in COMMANDS)


def test_it_is_a_module(place):
    done = subprocess.run([sys.executable, "-m", "openmythos", "sizes", "rdt_770m"], capture_output=True, text=True)
    assert done.returncode == 0 and "rdt_770m" in done.stdout
