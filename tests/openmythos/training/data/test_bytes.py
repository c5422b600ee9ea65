import sysconfig
from pathlib import Path

import pytest
import torch

from openmythos.training import VOCABULARY, Batches, corpus

TEXT = torch.arange(200, dtype=torch.uint8)


def read(tensor):
    return bytes(tensor.tolist())


def test_the_standard_library_is_the_same_every_time():
    one, two = corpus(), corpus()
    assert torch.equal(one.train, two.train) and torch.equal(one.validation, two.validation)
    assert one.train.dtype == torch.uint8 and int(one.train.max()) < VOCABULARY
    total = len(one.train) + len(one.validation)
    assert 1_000_000 < total <= 3_000_000
    assert 0.02 < len(one.validation) / total < 0.3


def test_the_standard_library_starts_with_its_first_modules():
    folder = Path(sysconfig.get_path("stdlib"))
    first = [f for f in sorted(folder.glob("*.py")) if not f.name.startswith("_sysconfigdata")][:10]
    train, validation = corpus()
    start = b"".join(f.read_bytes() for f in first[:9])
    held_out = first[9].read_bytes()
    assert read(train[: len(start)]) == start
    assert read(validation[: len(held_out)]) == held_out


def test_every_tenth_file_of_a_folder_is_held_out(tmp_path):
    (tmp_path / "b").mkdir()
    for i in reversed(range(21)):
        (tmp_path / ("b" if i % 2 else "") / f"{i:02}.txt").write_text(f"<{i}>")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("hidden")
    (tmp_path / "0.empty").write_text("")
    evens, odds = list(range(0, 21, 2)), list(range(1, 21, 2))  # "b/..." sorts behind all digits
    order = evens + odds
    train, validation = corpus(tmp_path)
    assert read(validation) == f"<{order[9]}><{order[19]}>".encode()
    assert read(train) == "".join(f"<{n}>" for i, n in enumerate(order) if i % 10 != 9).encode()


@pytest.mark.parametrize("as_text", [str, Path])
def test_a_single_file_is_cut_by_position(tmp_path, as_text):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(100)))
    train, validation = corpus(as_text(file))
    assert read(train) == bytes(range(90)) and read(validation) == bytes(range(90, 100))


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no text \(0 files"):
        corpus(tmp_path)
    (tmp_path / "empty").touch()
    for path in (tmp_path, tmp_path / "empty"):
        with pytest.raises(ValueError, match=r"holds no text \(1 files"):
            corpus(path)


def test_no_standard_library_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no \.py files"):
        corpus()


def test_a_batch_is_windows_of_the_text():
    inputs, targets = Batches(TEXT, 5, 7, seed=3)[11]
    assert inputs.shape == targets.shape == (5, 7) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))  # TEXT counts
    assert torch.equal(targets, inputs + 1)


def test_a_batch_depends_on_seed_and_step_alone():
    data = Batches(TEXT, 4, 8, seed=1)
    first = data[5]
    torch.manual_seed(99)
    for again in (data[5], Batches(TEXT, 4, 8, seed=1)[5], [b for b, _ in zip(data, range(6))][5]):
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    others = [data[4], data[6], Batches(TEXT, 4, 8, seed=2)[5], Batches(TEXT, 4, 8, seed=5)[1]]
    assert not any(torch.equal(first[0], other[0]) for other in others)


def test_the_numbers_are_pinned():
    """A resumed run must get its batches again, whatever has changed in this package."""
    assert Batches(TEXT, 3, 1, seed=7)[2][0].flatten().tolist() == [55, 55, 30]


def test_every_place_of_the_text_is_reached():
    data = Batches(torch.arange(6), 64, 4)
    assert set(data[0][0][:, 0].tolist()) == {0, 1}
    assert set(data[0][1][:, -1].tolist()) == {4, 5}


def test_batches_go_to_their_device():
    assert Batches(TEXT, 2, 3, device="meta")[0][0].device.type == "meta"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch=0), "batch = 0"),
        (dict(tokens=2.0), "tokens = 2.0"),
        (dict(seed=-1), "seed = -1"),
        (dict(tokens=200), "text: 200 long: must be longer than tokens = 200"),
        (dict(text=TEXT.float()), "text: torch.float32"),
        (dict(text=TEXT[None]), r"text: torch.uint8 of shape \(1, 200\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Batches(**{**dict(text=TEXT, batch=2, tokens=8), **change})
    with pytest.raises(ValueError, match="step = -1"):
        Batches(TEXT, 2, 8)[-1]
