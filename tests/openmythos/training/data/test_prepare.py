import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import openmythos.training.data.writer as writer
from openmythos.training import PrepareConfig, load_tokenizer, prepare
from openmythos.training.data.sources import documents

MODULE = sys.modules[PrepareConfig.__module__]  # its name in the package is that of the function
OURS = str(Path(writer.__file__).parents[1])  # openmythos/training


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def shards(folder):
    """Name -> what changes when a shard is written again."""
    found = {file.name: file.stat() for file in Path(folder).glob("[a-z]*.bin")}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def stream(folder, split):
    """All tokens of a split, read without our reader."""
    shards = json.loads((Path(folder) / "index.json").read_text())["shards"][split]
    return [token for shard in shards for token in np.fromfile(Path(folder) / shard["file"], "<u2").tolist()]


def is_held_out(text, fraction):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 < fraction


def test_the_streams_are_the_documents_with_eos(settings):
    config = settings()
    index = prepare(config)
    texts = list(documents(config.sources, "text", config.max_document))
    for split, held_out in (("train", False), ("held_out", True)):
        mine = [text for text in texts if is_held_out(text, 0.3) == held_out]
        assert stream(config.out, split) == [token for text in mine for token in (*text.encode(), 256)]
        assert index.tokens(split) == sum(len(text.encode()) + 1 for text in mine)
        assert [part.tokens for part in index.shards[split]][:-1] == [512] * (len(index.shards[split]) - 1)
        assert sum(part.documents for part in index.shards[split]) == len(mine)
    assert len(index.shards["train"]) > 10 and len(index.shards["held_out"]) > 3
    assert index.documents == len(texts) and (index.dtype, index.vocab_size, index.eos) == ("uint16", 257, 256)


def test_starts_lead_to_documents(settings):
    config = settings()
    index = prepare(config)
    for split in ("train", "held_out"):
        tokens = np.array(stream(config.out, split))
        starts = np.concatenate(
            [
                512 * i + np.fromfile(Path(config.out) / part.starts_file, "<u8").astype(int)
                for i, part in enumerate(index.shards[split])
            ]
        )
        ends = np.flatnonzero(tokens == 256)
        assert starts.tolist() == [0, *(ends[:-1] + 1)]


def test_the_files_are_small_endian_and_wide_enough(settings, monkeypatch):
    wide = load_tokenizer()
    monkeypatch.setattr(type(wide), "vocab_size", 65536)
    assert prepare(settings()).dtype == "uint16"
    monkeypatch.setattr(type(wide), "vocab_size", 65537)
    config = settings(out=settings().out + "2")
    assert prepare(config).dtype == "uint32"
    narrow = stream(settings().out, "train")
    assert np.fromfile(Path(config.out) / "train-00000.bin", "<u4").tolist() == narrow[:512]


def test_the_split_does_not_depend_on_order(settings, text, tmp_path):
    prepare(settings())
    names = sorted(file.name for file in text.iterdir())
    (tmp_path / "mixed").mkdir()
    random.Random(3).shuffle(names)
    for i, name in enumerate(names):
        (text / name).rename(tmp_path / "mixed" / f"{i:02}")
    prepare(settings(sources=[str(tmp_path / "mixed")], out=str(tmp_path / "two")))
    for split in ("train", "held_out"):
        one, two = (
            bytes(t % 256 for t in stream(out, split)).split(b"\0") for out in (settings().out, tmp_path / "two")
        )
        assert sorted(one) == sorted(two) and len(one) > 5


def test_a_finished_folder_is_checked_and_left_alone(settings, text):
    config = settings()
    first = prepare(config)
    before = shards(config.out), contents(config.out)
    assert prepare(config) == first
    assert (shards(config.out), contents(config.out)) == before
    (text / "07.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"sources: have changed since '.*out' was begun: \d+ documents now"):
        prepare(config)
    for file in text.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no text"):
        prepare(config)


class Killed(Exception):
    """Stands for the death of the process, where a test need not have a process."""


def stop_after(monkeypatch, shards):
    """prepare raises Killed once it has recorded so many shards."""
    record, recorded = writer.ShardWriter._record, []

    def counting(self):
        record(self)
        recorded.append(1)
        if len(recorded) == shards + 1:  # one without a shard at the beginning
            raise Killed

    monkeypatch.setattr(writer.ShardWriter, "_record", counting)


def interrupted(config, monkeypatch, shards=9):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, shards)
        prepare(config)


def test_no_document_is_tokenized_twice_but_those_of_the_last_shards(settings, monkeypatch):
    tokenizer, seen = load_tokenizer(), []
    encode_all = type(tokenizer).encode_all
    monkeypatch.setattr(MODULE, "_BATCH", 1)  # documents one by one
    monkeypatch.setattr(type(tokenizer), "encode_all", lambda *a: seen.extend(a[1]) or encode_all(*a))
    config = settings()
    interrupted(config, monkeypatch)
    first = set(seen)
    seen.clear()
    prepare(config)
    texts = list(documents(config.sources, "text", config.max_document))
    again = first.intersection(seen)
    assert first.union(seen) >= set(texts) and 0 < len(again) < len(first) / 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: (text / "01.txt").write_text("changed"), r"among the first \d+ documents"),
        (lambda text: (text / "00.0").write_text("new"), r"among the first \d+ documents"),
        (lambda text: [file.unlink() for file in sorted(text.iterdir())[2:]], "they have fewer documents"),
    ],
)
def test_sources_that_change_under_way(settings, text, monkeypatch, change, message):
    config = settings()
    interrupted(config, monkeypatch)
    before = contents(config.out)
    change(text)
    with pytest.raises(ValueError, match=rf"sources: have changed since '.*out' was begun: {message}"):
        prepare(config)
    assert {name: data for name, data in contents(config.out).items() if name in before} == before


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(held_out=0.2), r"held_out = 0.3, not 0.2"),
        (dict(shard_tokens=100), r"shard_tokens = 512, not 100"),
        (dict(sources=["stdlib"]), r"sources = \['.*text'\], not \['stdlib'\]"),
        (dict(tokenizer="other"), r"another tokenizer: 'bytes' there, 'other' here"),
    ],
)
def test_other_arguments_for_a_folder(settings, monkeypatch, begun, change, message):
    interrupted(settings(), monkeypatch) if begun else prepare(settings())
    if "tokenizer" in change:
        other = load_tokenizer()
        other.name, other.eos = "other", 255
        monkeypatch.setattr(MODULE, "load_tokenizer", lambda name, eos: other)
    before = contents(settings().out)
    with pytest.raises(ValueError, match=rf"out = '.*out': was begun with {message}; choose another folder"):
        prepare(settings(**change))
    assert contents(settings().out) == before


def test_a_folder_without_shards_may_begin_anew(settings, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"held_out = 1e-09: leaves split 'held_out' without any of the \d+ documents"):
        prepare(settings(held_out=1e-9, shard_tokens=10**6))
    with pytest.raises(ValueError, match=r"held_out = 0.999999: leaves split 'train' without"):
        prepare(settings(held_out=0.999999, shard_tokens=10**6))
    prepare(settings())
    prepare(settings(out=str(tmp_path / "two")))
    assert contents(settings().out) == contents(tmp_path / "two")


def test_nothing_held_out(settings):
    index = prepare(settings(held_out=0))
    assert not index.shards["held_out"] and index.tokens("train") == len(stream(settings().out, "train"))


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_a_shard_that_is_gone(settings, monkeypatch, damage):
    interrupted(settings(), monkeypatch)
    damage(Path(settings().out) / "train-00001.bin")
    with pytest.raises(ValueError, match=r"train-00001.bin: (is missing|has 5 bytes, not 1024): damaged; delete"):
        prepare(settings())


def test_folders_that_are_not_ours(settings, text, tmp_path):
    with pytest.raises(ValueError, match=r"out': must not be in sources: '.*text'"):
        prepare(settings(out=str(text / "out")))
    with pytest.raises(ValueError, match=r"00.txt': must be a folder"):
        prepare(settings(sources=["stdlib"], out=str(text / "00.txt")))
    with pytest.raises(ValueError, match=r"holds files but no index.json; must be a new or empty folder"):
        prepare(settings(sources=["stdlib"], out=str(text)))
    assert len(list(text.iterdir())) == 60
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index.json: is not the index of token shards"):
        prepare(settings())


def test_one_process_at_a_time(settings):
    Path(settings().out).mkdir()
    folder = os.open(settings().out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=r"another process is writing there"):
        prepare(settings())
    os.close(folder)
    prepare(settings())


def test_a_full_disk(settings, tmp_path):
    prepare(settings(shard_tokens=8192))
    whole = contents(settings().out)
    config = settings(shard_tokens=8192, out=str(tmp_path / "full"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(
            OSError, match=r"train-00000.bin: cannot be written: File too large; what is there is whole"
        ):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(contents(config.out)) <= {"unfinished.json", "held_out-00000.bin", "held_out-00000.starts.bin"}
    prepare(config)
    assert contents(config.out) == whole


def in_a_child(work):
    """Runs work() in a forked process and returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed_at_line(config, line):
    """Runs prepare in a process that dies before it runs so many lines of openmythos/training."""
    left = [line]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        left[0] -= event == "line"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def work():
        sys.settrace(trace)
        prepare(config)

    return os.waitpid(in_a_child(work), 0)[1] == signal.SIGKILL


def killed_after(config, seconds):
    child = in_a_child(lambda: prepare(config))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def not_killed(config, moment):
    prepare(config)
    return False


def lines(config):
    """How many lines of openmythos/training a run takes."""
    count, usual = [0], sys.gettrace()

    def trace(frame, event, argument):
        count[0] += event == "line"
        return trace if frame.f_code.co_filename.startswith(OURS) else None

    sys.settrace(trace)
    try:
        prepare(config)
    finally:
        sys.settrace(usual)
    return count[0]


def test_killed_at_any_moment(settings, tmp_path):
    total = lines(settings())
    began = time.perf_counter()
    prepare(settings(out=str(tmp_path / "timed")))
    seconds = time.perf_counter() - began
    undisturbed, rng, kills = contents(settings().out), random.Random(5), 0
    moments = [rng.randrange(total) for _ in range(8)]
    moments += [total - i for i in range(1, 60, 6)]  # the end has most of the kinds of files
    for i, line in enumerate(moments):
        config, there, again = settings(out=str(tmp_path / f"killed{i}")), {}, rng.random()
        second = (killed_at_line, int(again * total)) if i % 2 else (killed_after, again * seconds)
        for run, moment in ((killed_at_line, line), second, (not_killed, None)):
            kills += run(config, moment)
            assert {name: seen for name, seen in shards(config.out).items() if name in there} == there
            there = shards(config.out)
        assert contents(config.out) == undisturbed, f"killed at line {line} of {total}"
    assert kills > len(moments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(held_out=1.0), "held_out = 1.0: must be >= 0 and < 1"),
        (dict(held_out=float("nan")), "held_out = nan"),
        (dict(shard_tokens=0), "shard_tokens = 0"),
        (dict(max_document=1.5), "max_document = 1.5"),
        (dict(sources=[]), r"sources = \[\]: must be a list of at least one"),
        (dict(sources="text"), "sources = 'text': must be a list"),
        (dict(sources=["text", ""]), r"sources = \['text', ''\]: must be a list"),
        (dict(sources=[Path("text")]), r"sources = \[PosixPath\('text'\)\]: .*each a string"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**change)
    with pytest.raises(ValueError, match=r"sources: 'nowhere' does not exist"):
        prepare(PrepareConfig(sources=["nowhere"], out="not_made"))
    assert not Path("not_made").exists()


def test_progress(settings, capfd):
    prepare(settings(progress=True))
    assert "prepare" in capfd.readouterr().err
    prepare(settings())
    assert capfd.readouterr().err == ""
