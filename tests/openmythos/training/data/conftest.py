"""Small folders of text, and of token shards."""

import os
import random

import pytest

from openmythos.training import PrepareConfig


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """Without waiting for the disk, which the death of a process does not need; most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def text(tmp_path):
    """A folder of 60 documents of very different lengths."""
    folder, rng = tmp_path / "text", random.Random(1)
    folder.mkdir()
    for i in range(60):
        size = rng.choice((3, 40, 700))
        (folder / f"{i:02}.txt").write_text(f"{i}: " + "".join(rng.choices("abcdé \n", k=size)))
    return folder


@pytest.fixture
def settings(text, tmp_path):
    """settings(**changes): a PrepareConfig that makes about thirty shards of the folder."""

    def make(**changes):
        usual = dict(sources=[str(text)], out=str(tmp_path / "out"), held_out=0.3, shard_tokens=512, max_document=500)
        return PrepareConfig(**{**usual, "progress": False, **changes})

    return make
