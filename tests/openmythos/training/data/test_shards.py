import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openmythos.training import TokenShards, evaluate, prepare, train
from openmythos.training.data import load_tokenizer
from openmythos.training.data.sources import documents


@pytest.fixture
def folder(settings):
    prepare(settings())
    return Path(settings().out)


def stream(folder, split):
    parts = json.loads((folder / "index.json").read_text())["shards"][split]
    return np.concatenate([np.fromfile(folder / part["file"], "<u2") for part in parts]).astype(int)


def rows(data, steps):
    """The windows of some steps, tokens + 1 long."""
    return [[*i, t[-1]] for step in steps for i, t in zip(*(x.tolist() for x in data[step]))]


def windows(folder, split, tokens):
    whole = stream(folder, split).tolist()
    return [whole[i : i + tokens + 1] for i in range(0, len(whole) - tokens, tokens)]


@pytest.mark.parametrize("tokens", [1, 7, 100, 511, 512, 513, 2000])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_window_comes_once_in_an_epoch(folder, tokens, split):
    data = TokenShards(folder, split, 64, tokens)
    expected = windows(folder, split, tokens)
    assert data.windows == len(expected) > 1
    sequence = rows(data, range(2 * len(expected) // 64 + 1))
    for epoch in (0, 1):
        found = sequence[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(found) == sorted(expected)
        assert (found == expected) == (split == "held_out")


def test_a_batch_is_inputs_and_targets(folder):
    inputs, targets = TokenShards(folder, "train", 6, 50)[3]
    assert inputs.shape == targets.shape == (6, 50) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert TokenShards(folder, "train", 2, 3, device="meta")[0][0].device.type == "meta"


def test_epochs_follow_on_within_a_batch(folder):
    one, data = TokenShards(folder, "train", 1, 300, seed=5), TokenShards(folder, "train", 17, 300, seed=5)
    steps = 2 * data.windows // 17 + 2
    assert data.windows % 17 and rows(data, range(steps)) == rows(one, range(17 * steps))


def test_a_batch_depends_on_seed_and_step_alone(folder):
    data = TokenShards(folder, "train", 4, 20, seed=1)
    first = rows(data, [9])
    rows(data, [3])
    torch.manual_seed(7)
    assert rows(data, [9]) == rows(TokenShards(folder, "train", 4, 20, seed=1), [9]) == first
    assert rows(TokenShards(folder, "train", 4, 20, seed=2), [9]) != first != rows(data, [8])
    epochs = [rows(data, range(i * data.windows, i * data.windows + 2)) for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_ranks_together_have_the_rows_of_one(folder, split, ranks):
    alone = TokenShards(folder, split, 12, 30, seed=3)
    divided = [TokenShards(folder, split, 12, 30, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in (0, 1, 20, 1000):
        assert divided[0][step][0].shape == (12 // ranks, 30)
        for i in (0, 1):
            assert torch.equal(torch.cat([data[step][i] for data in divided]), alone[step][i])


def test_the_order_is_pinned(folder):
    """A resumed run must get its windows again, whatever has changed in this package."""
    data = TokenShards(folder, "train", 4, 100, seed=3)
    assert data._windows(np.arange(5, 9)).tolist() == [58, 69, 79, 44]


def test_documents_can_be_looked_at(folder, settings):
    texts = list(documents(settings().sources, "text", 500))
    tokenizer, found = load_tokenizer(), []
    for split in ("train", "held_out"):
        data = TokenShards(folder, split, 1, 1)
        count = sum(part.documents for part in data.index.shards[split])
        found += [tokenizer.decode(data.document(i)) for i in range(count)]
        for i in (-1, count):
            with pytest.raises(IndexError, match=rf"i = {i}: split '{split}' of .* has documents 0 .. {count - 1}"):
                data.document(i)
    assert sorted(found) == sorted(texts)


def test_a_model_trains_on_shards(folder, build):
    model = build(vocab_size=257)
    data = TokenShards(folder, "train", 4, 32)
    data.check_vocabulary(model.cfg)
    held_out = TokenShards(folder, "held_out", 4, 32)
    before = evaluate(model, held_out, 4)
    assert len(list(train(model, data, 15, lr=1e-2))) == 15
    assert evaluate(model, held_out, 4) < before - 1


def test_a_vocabulary_that_is_too_small(folder):
    data = TokenShards(folder, "train", 1, 8)
    data.check_vocabulary(SimpleNamespace(vocab_size=257))
    data.check_vocabulary(SimpleNamespace(vocab_size=320))
    with pytest.raises(ValueError, match=r"vocab_size = 256: must be >= 257 for .*out, made by tokenizer 'bytes'"):
        data.check_vocabulary(SimpleNamespace(vocab_size=256))


@pytest.mark.parametrize("name", ["train-00003.bin", "train-00003.starts.bin"])
def test_damaged_shards(folder, name):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for ranks in (1, 2, 4):
        refused = []
        for rank in range(ranks):
            try:
                TokenShards(folder, "train", 4, 8, rank=rank, ranks=ranks)
            except ValueError as error:
                assert f"{name}: damaged: its checksum is" in str(error)
                refused.append(rank)
        assert refused == [3 % ranks]  # each rank looks at its share
    TokenShards(folder, "held_out", 1, 8)
    TokenShards(folder, "train", 1, 8, check=False)
    for content in (whole[:-8], whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: has {len(content)} bytes, not {len(whole)}: damaged"):
            TokenShards(folder, "train", 1, 8, check=False)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: is missing: damaged"):
        TokenShards(folder, "train", 1, 8, check=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split="test"), "split = 'test': must be one of train, held_out"),
        (dict(batch=0), "batch = 0"),
        (dict(tokens=1.5), "tokens = 1.5"),
        (dict(tokens=10**6), r"tokens = 1000000: split 'train' of .*out has \d+ tokens; must be fewer"),
        (dict(seed=-1), "seed = -1"),
        (dict(rank=2, ranks=2), "rank = 2: must be < ranks = 2"),
        (dict(batch=3, ranks=2), "batch = 3: must be a multiple of ranks = 2"),
    ],
)
def test_bad_arguments(folder, change, message):
    with pytest.raises(ValueError, match=message):
        TokenShards(folder, **{**dict(split="train", batch=2, tokens=8), **change})
    with pytest.raises(ValueError, match="step = -1"):
        TokenShards(folder, "train", 2, 8)[-1]


def test_a_split_without_documents(settings):
    prepare(settings(held_out=0))
    with pytest.raises(ValueError, match=r"split 'held_out' of .* has 0 tokens"):
        TokenShards(settings().out, "held_out", 1, 1)
