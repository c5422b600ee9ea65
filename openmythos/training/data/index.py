"""The index of a folder of token shards: what `prepare` writes and `TokenShards` reads."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from openmythos.training.data.tokenizers import Fingerprint
from openmythos.training.files import replacing

SPLITS = ("train", "held_out")
INDEX = "index.json"
UNFINISHED = "unfinished.json"  # stands in the place of INDEX until the last shard is written

_FORMAT, _VERSION = "openmythos tokens", 1


@dataclass
class Part:
    """One shard: a file of tokens, and one of the places where documents begin in it.

    Attributes:
        file: tokens, (tokens,) of the index's dtype, little endian, nothing else.
        tokens: how many; all shards of a split but the last have as many.
        checksum: CRC-32 of the file.
        documents: how many documents begin in this shard.
        starts_file: where they begin, (documents,) uint64 little endian, counted from the shard's first token.
        starts_checksum: CRC-32 of that file.
    """

    file: str
    tokens: int
    checksum: int
    documents: int
    starts_file: str
    starts_checksum: int


@dataclass
class Index:
    """All that a folder of shards says about itself.

    Attributes:
        tokenizer: what made the tokens.
        vocab_size: of the tokenizer; every token is smaller.
        eos: the token at the end of every document.
        dtype: "uint16" or "uint32".
        settings: the arguments of `prepare` that the tokens depend on.
        documents: documents read, both splits together.
        digest: SHA-256 over the documents in the order in which they were read.
        shards: of each split, in the order of the stream.
    """

    tokenizer: Fingerprint
    vocab_size: int
    eos: int
    dtype: str
    settings: dict[str, Any]
    documents: int = 0
    digest: str = ""
    shards: dict[str, list[Part]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(part.tokens for part in self.shards[split])

    def numpy_dtype(self) -> np.dtype:
        """The dtype of a token on the disk."""
        return np.dtype(self.dtype).newbyteorder("<")


def read_index(folder: str | os.PathLike) -> Index:
    """The index of a finished folder.

    Raises:
        ValueError: there is none, it is unfinished, damaged, or of another format.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        return parse(folder / INDEX)[0]
    if (folder / UNFINISHED).exists():
        raise ValueError(f"{folder}: is not finished: call prepare again with the arguments that it was begun with")
    raise ValueError(f"{folder}: holds no {INDEX}; must be a folder that prepare wrote")


def write(path: Path, index: Index, **more: Any) -> None:
    """Writes an index, and what an unfinished one holds beside."""
    content = {"format": _FORMAT, "version": _VERSION, **asdict(index), "tokenizer": index.tokenizer._asdict(), **more}
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def parse(path: Path) -> tuple[Index, dict[str, Any]]:
    """The index in a file, and what `write` was given beside."""
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError("unknown format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not the index of token shards: {type(error).__name__}: {error}") from error
    if (version := content.pop("version", None)) != _VERSION:
        raise ValueError(f"{path}: is of version {version!r}; this package reads version {_VERSION}")
    try:
        index = Index(**{f.name: content.pop(f.name) for f in fields(Index)})
        index.tokenizer = Fingerprint(**index.tokenizer)  # type: ignore[arg-type]
        index.shards = {split: [Part(**part) for part in index.shards[split]] for split in SPLITS}  # type: ignore[arg-type]
        if index.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {index.dtype!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {type(error).__name__}: {error}") from error
    return index, content


def check_size(folder: Path, part: Part, index: Index) -> None:
    """Raises ValueError if a file of a shard is missing or of the wrong length."""
    sizes = {part.file: part.tokens * index.numpy_dtype().itemsize, part.starts_file: part.documents * 8}
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"{path}: {what}: damaged; delete {folder} and prepare it again")
