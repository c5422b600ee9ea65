"""Text to token ids and back: bytes, tiktoken's encodings, files of the tokenizers package, the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Tokens that end a document, by the files of well-known models; the first that a vocabulary has is taken.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<eos>", "[SEP]")

# What the fingerprint encodes: spaces, numbers, capitals, line ends, scripts and signs, which rules treat apart.
_PROBE = (
    "The quick  brown FOX's 1234567 + 0.5e-3\r\n\n\tdef f(x): # caf\u00e9 \u0416\u00df \u4e2d\u6587 \U0001f600 <s> "
)


class Fingerprint(NamedTuple):
    """Which tokenizer made some tokens.

    Attributes:
        name: what `load_tokenizer` was called with; for people.
        sha256: of all tokens, their ids, EOS, and the ids of a fixed text. Equal tokenizers have equal ones under any
            name and in any version of their package.
    """

    name: str
    sha256: str


class Tokenizer:
    """What `load_tokenizer` returns.

    Attributes:
        name: what it was loaded by.
        vocab_size: the largest id plus one.
        eos: the id that ends a document.
    """

    name: str
    vocab_size: int
    eos: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, (n,) int64. The text of a special token is encoded as any other text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; packages that have threads use them."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without EOS.

        Bytes that are no UTF-8 become U+FFFD. Ids without a token, which a model with a padded vocabulary may sample,
        are no error.
        """
        raise NotImplementedError

    def fingerprint(self) -> Fingerprint:
        """What token shards keep, to know their tokenizer by."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.eos}".encode())
        for token, number in self._tokens():
            digest.update(b"%d %d " % (number, len(token)) + token)
        digest.update(self.encode(_PROBE).astype("<i8").tobytes())
        return Fingerprint(self.name, digest.hexdigest())

    def _tokens(self) -> Iterable[tuple[bytes, int]]:
        """All (token, id), by id."""
        raise NotImplementedError


def load_tokenizer(name: str | os.PathLike = "bytes", eos: str | None = None) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: "bytes" (UTF-8, ids 0..255, EOS 256), "tiktoken:ENCODING" such as "tiktoken:gpt2", a JSON file of the
            `tokenizers` package or a folder with a `tokenizer.json`, or the name of a model on the Hugging Face Hub.
        eos: the token that ends a document; None means the tokenizer's own, or the usual one that its vocabulary has.

    Raises:
        ImportError: the package that reads it is not installed.
        ValueError: there is no such tokenizer, or it has no token for EOS.
    """
    name = os.fspath(name)
    if name == "bytes":
        if eos is not None:
            raise ValueError(f"eos = {eos!r}: must be None for tokenizer 'bytes', whose EOS is 256")
        return _Bytes()
    if name.startswith("tiktoken:"):
        return _Tiktoken(name, eos)
    return _HuggingFace(name, eos)


class _Bytes(Tokenizer):
    name = "bytes"
    vocab_size = 257
    eos = 256

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(min(i, 255) for i in map(int, ids) if i != self.eos).decode(errors="replace")

    def _tokens(self) -> Iterable[tuple[bytes, int]]:
        return ((bytes([i]), i) for i in range(256))


class _Tiktoken(Tokenizer):
    def __init__(self, name: str, eos: str | None):
        package = _package("tiktoken", name)
        encoding = name.removeprefix("tiktoken:")
        known = package.list_encoding_names()
        if encoding not in known:
            raise ValueError(f"tokenizer = {name!r}: tiktoken has no {encoding!r}; it has {', '.join(known)}")
        self.name = name
        try:
            self._encoding = package.get_encoding(encoding)
        except Exception as error:  # it downloads its file at the first use
            raise ValueError(f"tokenizer = {name!r}: cannot be had: {type(error).__name__}: {error}") from error
        self.vocab_size = self._encoding.n_vocab
        special = {token: self._encoding.encode_single_token(token) for token in self._encoding.special_tokens_set}
        self.eos = _end(name, special, eos)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        threads = min(len(texts), os.cpu_count() or 1)
        return [np.array(ids, np.int64) for ids in self._encoding.encode_ordinary_batch(texts, num_threads=threads)]

    def decode(self, ids: Iterable[int]) -> str:
        text = b"".join(self._token(i) or b"\xff" for i in map(int, ids) if i != self.eos)
        return text.decode(errors="replace")

    def _tokens(self) -> Iterable[tuple[bytes, int]]:
        return ((token, i) for i in range(self.vocab_size) if (token := self._token(i)) is not None)

    def _token(self, i: int) -> bytes | None:
        try:
            return self._encoding.decode_single_token_bytes(i)
        except KeyError:  # special tokens may lie beyond a gap
            return None


class _HuggingFace(Tokenizer):
    def __init__(self, name: str, eos: str | None):
        package = _package("tokenizers", name)
        self.name = name
        self._tokenizer = _read(package.Tokenizer, name)
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document must not end it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.eos = _end(name, self._vocabulary, eos)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in map(int, ids) if i != self.eos], skip_special_tokens=False)

    def _tokens(self) -> Iterable[tuple[bytes, int]]:
        for token, i in sorted(self._vocabulary.items(), key=lambda item: (item[1], item[0])):
            yield token.encode(), i


def _read(kind: Any, name: str) -> Any:
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.exists() and (path.suffix == ".json" or path.is_absolute() or name.startswith(".")):
        raise ValueError(f"tokenizer = {name!r}: there is no file {path}")
    try:
        return kind.from_file(str(path)) if path.exists() else kind.from_pretrained(name)
    except Exception as error:  # the package raises plain Exceptions, the Hub's client anything
        tried = "cannot be read" if path.exists() else "is no file, and cannot be had from the Hugging Face Hub"
        raise ValueError(f"tokenizer = {name!r}: {tried}: {type(error).__name__}: {error}") from error


def _end(name: str, vocabulary: dict[str, int], eos: str | None) -> int:
    candidates = _ENDS if eos is None else (eos,)
    for token in candidates:
        if token in vocabulary:
            return vocabulary[token]
    if eos is not None:
        raise ValueError(f"eos = {eos!r}: must be a token of tokenizer {name!r}")
    raise ValueError(
        f"tokenizer = {name!r}: has none of {', '.join(_ENDS)}; name the token that ends a document as eos"
    )


def _package(package: str, name: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(
            f"tokenizer = {name!r} needs the {package} package: pip install {package}", name=package
        ) from error
