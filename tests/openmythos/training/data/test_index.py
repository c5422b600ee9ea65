import json
from pathlib import Path

import pytest

from openmythos.training import TokenShards, prepare
from openmythos.training.data import read_index


def open_shards(folder):
    TokenShards(folder, "train", 1, 8)


@pytest.fixture
def path(settings):
    prepare(settings())
    return Path(settings().out) / "index.json"


@pytest.mark.parametrize("read", [read_index, open_shards])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(version=2), "index.json: is of version 2; this package reads version 1"),
        (lambda c: c.update(format="other"), "index.json: is not the index of token shards"),
        (lambda c: c.pop("format"), "index.json: is not the index of token shards"),
        (lambda c: c.pop("eos"), "index.json: is damaged: KeyError: 'eos'"),
        (lambda c: c.update(dtype="float64"), "index.json: is damaged: ValueError: dtype 'float64'"),
        (lambda c: c["shards"].pop("train"), "index.json: is damaged: KeyError: 'train'"),
        (lambda c: c["shards"]["train"][0].pop("checksum"), "index.json: is damaged: TypeError"),
    ],
)
def test_an_index_of_another_kind(path, read, change, message):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(path.parent)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_no_index_at_all(path, content):
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index.json: is not the index of token shards"):
        read_index(path.parent)


def test_a_folder_without_an_index(path):
    path.rename(path.with_name("unfinished.json"))
    with pytest.raises(ValueError, match=r"out: is not finished: call prepare again with the arguments"):
        open_shards(path.parent)
    path.with_name("unfinished.json").unlink()
    with pytest.raises(ValueError, match=r"out: holds no index.json; must be a folder that prepare wrote"):
        open_shards(path.parent)


def test_shards_of_different_length(path):
    content = json.loads(path.read_text())
    content["shards"]["train"].insert(0, content["shards"]["train"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its shards differ in length: damaged"):
        open_shards(path.parent)


def test_an_index_that_was_read_is_the_one_that_was_written(settings):
    index = prepare(settings())
    assert read_index(Path(settings().out)) == index
    assert read_index(settings().out) == index
