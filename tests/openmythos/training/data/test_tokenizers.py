import random
import sys

import numpy as np
import pytest

from openmythos.training import load_tokenizer

TEXTS = ["", "plain text\n", "naïve — 中文 \U0001f600\r\n\ttabs", "an <|endoftext|> in the text", "a\0b"]


@pytest.fixture
def saved(tmp_path):
    """saved(name, *special): a byte-level BPE of the tokenizers package, as a file."""
    package = pytest.importorskip("tokenizers")

    def save(name, *special, words="hello world"):
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        alphabet = package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([words] * 20, trainer)
        # A template, truncation and padding, as files of models have them: none may reach the data.
        if special:
            tokenizer.post_processor = package.processors.TemplateProcessing(
                single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
            )
        tokenizer.enable_truncation(5)
        tokenizer.enable_padding(length=50)
        tokenizer.save(str(tmp_path / name))
        return str(tmp_path / name)

    return save


@pytest.fixture
def encodings(monkeypatch):
    """tiktoken, with one encoding that needs no file: ids are bytes, and EOS lies beyond a gap."""
    package = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256}
    special = {"<|fim|>": 299, "<|endoftext|>": 300}
    small = package.Encoding("small", pat_str=r"\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(package, "list_encoding_names", lambda: ["small", "large"])
    monkeypatch.setattr(package, "get_encoding", {"small": small}.__getitem__)


def check_round_trip(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_all(TEXTS)):
        assert ids.dtype == np.int64 and ids.ndim == 1 and (ids == tokenizer.encode(text)).all()
        assert tokenizer.eos not in ids and (ids < tokenizer.vocab_size).all()
        assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eos]) == text
    assert 0 <= tokenizer.eos < tokenizer.vocab_size
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size + 20)), str)  # a padded vocabulary is no error


def test_bytes():
    tokenizer = load_tokenizer()
    check_round_trip(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.encode("é").tolist() == list("é".encode())
    assert tokenizer.decode([65, 0xC3, 66, 300]) == "A\ufffdB\ufffd"
    with pytest.raises(ValueError, match=r"eos = '</s>': must be None for tokenizer 'bytes'"):
        load_tokenizer("bytes", eos="</s>")


def test_the_fingerprint_of_bytes_is_pinned():
    """Folders of shards outlive versions of this package."""
    assert load_tokenizer().fingerprint().sha256.startswith("2b966d2654ebdebb")


def test_tiktoken(encodings):
    tokenizer = load_tokenizer("tiktoken:small")
    check_round_trip(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos) == (301, 300)
    assert tokenizer.encode("hen").tolist() == [256, ord("n")]
    assert tokenizer.decode([270, 65, 0xFF]) == "\ufffdA\ufffd"
    assert load_tokenizer("tiktoken:small", eos="<|fim|>").eos == 299
    with pytest.raises(ValueError, match=r"tokenizer = 'tiktoken:gpt9': tiktoken has no 'gpt9'; it has small, large"):
        load_tokenizer("tiktoken:gpt9")
    with pytest.raises(ValueError, match=r"tokenizer = 'tiktoken:large': cannot be had: KeyError"):
        load_tokenizer("tiktoken:large")


def test_a_tokenizers_file(saved):
    path = saved("tokenizer.json", "<pad>", "<|endoftext|>")
    tokenizer = load_tokenizer(path)
    check_round_trip(tokenizer)
    assert tokenizer.name == path and tokenizer.eos == 1
    assert len(tokenizer.encode("hello world")) < 11  # merges are used; nothing is added, cut or padded
    assert load_tokenizer(path, eos="<pad>").eos == 0
    folder = path.removesuffix("/tokenizer.json")
    assert load_tokenizer(folder).fingerprint().sha256 == tokenizer.fingerprint().sha256


def test_the_usual_end_is_taken_and_others_must_be_named(saved):
    assert load_tokenizer(saved("a.json", "</s>", "<|endoftext|>")).eos == 1
    assert load_tokenizer(saved("b.json", "<s>", "</s>")).eos == 1
    path = saved("c.json", "<stop>")
    assert load_tokenizer(path, eos="<stop>").eos == 0
    with pytest.raises(ValueError, match=r"c.json': has none of <\|endoftext\|>, .*name the token that ends"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"eos = '<end>': must be a token of tokenizer '.*c.json'"):
        load_tokenizer(path, eos="<end>")


def test_fingerprints_tell_tokenizers_apart(saved, encodings):
    names = ["bytes", "tiktoken:small", saved("a.json", "</s>", "<eos>"), saved("b.json", "<eos>", "</s>")]
    names.append(saved("c.json", "</s>", "<eos>", words="other words"))
    found = [load_tokenizer(name).fingerprint() for name in names]
    found.append(load_tokenizer(names[2], eos="<eos>").fingerprint())
    assert len({fingerprint.sha256 for fingerprint in found}) == len(found)
    assert [fingerprint.name for fingerprint in found[:-1]] == names


def test_what_there_is_not(tmp_path):
    pytest.importorskip("tokenizers")
    for name in (str(tmp_path / "none.json"), "none.json", "./none"):
        with pytest.raises(ValueError, match="there is no file"):
            load_tokenizer(name)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json': cannot be read: "):
        load_tokenizer(tmp_path / "broken.json")


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    package = pytest.importorskip("tokenizers")

    class Nothing:
        def from_pretrained(name):
            raise OSError("no network")

    monkeypatch.setattr(package, "Tokenizer", Nothing)
    with pytest.raises(ValueError, match=r"'byte': is no file, and cannot be had from the .* Hub: OSError: no network"):
        load_tokenizer("byte")


@pytest.mark.parametrize("package, name", [("tiktoken", "tiktoken:gpt2"), ("tokenizers", "gpt2")])
def test_a_missing_package_is_named(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"tokenizer = '{name}' needs the {package} package: pip install {package}"):
        load_tokenizer(name)


def test_random_texts_come_back(saved):
    rng = random.Random(0)
    letters = [chr(i) for i in (*range(0xD7FF), *range(0xE000, 0x11000)) if i != 0xFEFF]
    for tokenizer in (load_tokenizer(), load_tokenizer(saved("t.json", "</s>"))):
        for _ in range(20):
            text = "".join(rng.choices(letters, k=50))
            assert tokenizer.decode(tokenizer.encode(text)) == text
