"""Text to token shards on a disk; see docs/training-data.md for the files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from openmythos.config import checked_integer
from openmythos.training.data import sources as _sources
from openmythos.training.data.index import Index
from openmythos.training.data.tokenizers import Tokenizer, load_tokenizer
from openmythos.training.data.writer import ShardWriter, begun

_BATCH = 1 << 20  # characters that are encoded in one call


@dataclass
class PrepareConfig:
    """What `prepare` turns into tokens, and how.

    Attributes:
        sources: files, folders, "hf:NAME[:CONFIG[:SPLIT]]" or "stdlib", in the order of the token stream.
        out: the folder to write; new, empty, or begun by the same call.
        tokenizer: "bytes", "tiktoken:ENCODING", a tokenizer.json, or the name of a model on the Hugging Face Hub.
        eos: the token that ends a document; null means the tokenizer's own.
        held_out: the fraction of documents that goes to the split "held_out", chosen by a hash of their text.
        max_document: longer texts are cut, at the end of a line, after this many characters.
        text_key: the key of the text in .jsonl files and data sets.
        shard_tokens: tokens in a shard file, of two or four bytes each.
        progress: show a progress bar.
    """

    sources: list[str] = field(default_factory=lambda: ["stdlib"])
    out: str = "data"
    tokenizer: str = "bytes"
    eos: str | None = None
    held_out: float = 0.05
    max_document: int = 100_000
    text_key: str = "text"
    shard_tokens: int = 1 << 26
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("max_document", "shard_tokens"):
            checked_integer(name, getattr(self, name), 1)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out!r}: must be >= 0 and < 1")
        strings = isinstance(self.sources, list) and all(isinstance(source, str) and source for source in self.sources)
        if not strings or not self.sources:
            raise ValueError(f"sources = {self.sources!r}: must be a list of at least one, each a string")


def prepare(config: PrepareConfig) -> Index:
    """Turns text into memory-mapped token shards for `TokenShards`, and returns their index.

    A run that was killed at any moment goes on when it is called again with the same arguments; its files are those of
    an undisturbed run, byte for byte. It reads the documents again up to where it was, to see that they have not
    changed, and tokenizes none of them twice but those of the last shards. A finished folder is checked against its
    sources in the same way, except for data sets of the Hub, and left as it is.

    Raises:
        ValueError: naming the argument, what came and what was expected; or the sources have changed since the folder
            was begun. ImportError: a source or tokenizer needs a package. OSError: a file cannot be read or written,
            the disk being full for example; the folder stays whole.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eos)
    _sources.check(config.sources)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = '{out}': must be a folder")
    for source in config.sources:
        if source != "stdlib" and out.resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"out = '{out}': must not be in sources: {source!r}")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        index, points, finished = begun(out, _empty_index(config, tokenizer))
        if finished:
            if not any(source.startswith(_sources.HUB) for source in config.sources):
                _verify(config, index)
            return index
        return _write(config, tokenizer, ShardWriter(out, index, points))


class _Document(NamedTuple):
    number: int
    split: str
    text: str
    digest: str  # of this document and all before


def _empty_index(config: PrepareConfig, tokenizer: Tokenizer) -> Index:
    names = ("sources", "held_out", "max_document", "text_key", "shard_tokens")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    settings = {name: getattr(config, name) for name in names}
    return Index(tokenizer.fingerprint(), tokenizer.vocab_size, tokenizer.eos, dtype, settings)


def _write(config: PrepareConfig, tokenizer: Tokenizer, writer: ShardWriter) -> Index:
    begin = dict(writer.points)
    waiting: list[_Document] = []
    characters, last = 0, None

    def encode() -> None:
        for document, ids in zip(waiting, tokenizer.encode_all([document.text for document in waiting])):
            writer.add(document.split, document.number, ids, document.digest)
        waiting.clear()

    for document in _documents(config):
        last = document
        for point in begin.values():
            if point.document == document.number and point.digest != document.digest:
                raise _changed(config, f"among the first {document.number + 1} documents")
        if document.number >= begin[document.split].document:
            waiting.append(document)
            characters += len(document.text)
        if characters >= _BATCH:
            encode()
            characters = 0
    encode()
    if last is None or any(point.document > last.number for point in begin.values()):
        raise _changed(config, "they have fewer documents")
    return writer.finish(last.number + 1, last.digest)


def _verify(config: PrepareConfig, index: Index) -> None:
    last = None
    for document in _documents(config):
        last = document
    if last is None or (last.number + 1, last.digest) != (index.documents, index.digest):
        raise _changed(config, f"{0 if last is None else last.number + 1} documents now, {index.documents} then")


def _changed(config: PrepareConfig, where: str) -> ValueError:
    return ValueError(
        f"sources: have changed since '{config.out}' was begun: {where}; choose another folder, or delete this one"
    )


def _documents(config: PrepareConfig) -> Iterator[_Document]:
    digest, limit = hashlib.sha256(), int(config.held_out * 2**64)
    texts = _sources.documents(config.sources, config.text_key, config.max_document)
    with tqdm(unit="B", unit_scale=True, desc="prepare", disable=not config.progress) as bar:
        for number, text in enumerate(texts):
            content = text.encode()
            own = hashlib.sha256(content).digest()
            digest.update(own)
            # By content alone, so that order, and what else there is, do not matter and copies fall on one side.
            split = "held_out" if int.from_bytes(own[:8], "big") < limit else "train"
            bar.update(len(content))
            yield _Document(number, split, text, digest.hexdigest())


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuses a folder that another process is writing; the lock ends with the process, however it ends."""
    import fcntl  # not on every system

    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out = '{out}': another process is writing there") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)
