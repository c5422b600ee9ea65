"""Byte-level text: a corpus that comes with every Python, or files of one's own, and repeatable batches."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmythos.config import checked_integer

VOCABULARY = 256  # a token is a byte

_STDLIB_LIMIT = 3_000_000  # bytes: plenty for tiny models, and less than any version of Python has


class Corpus(NamedTuple):
    """Text as bytes, (n,) uint8 each; the two parts are disjoint."""

    train: Tensor
    validation: Tensor


def corpus(path: str | Path | None = None) -> Corpus:
    """Reads text and splits it, the same way every time.

    Args:
        path: a file, or a folder whose files are read in sorted order, hidden ones left out. None means the standard
            library of the running Python: the modules directly in its folder (so no tests or site-packages), sorted,
            up to 3 MB.

    Returns:
        Every tenth file for validation, the others for training. With fewer than ten files, the last tenth of all
        bytes for validation.

    Raises:
        ValueError: if there is nothing at `path`, or nothing in it.
    """
    texts = _stdlib() if path is None else _own(Path(path))
    held_out = texts[9::10]
    if held_out:
        return Corpus(_tensor(text for i, text in enumerate(texts) if i % 10 != 9), _tensor(held_out))
    whole = _tensor(texts)
    cut = len(whole) - len(whole) // 10
    return Corpus(whole[:cut], whole[cut:])


def _stdlib() -> list[bytes]:
    folder = Path(sysconfig.get_path("stdlib"))
    texts, room = [], _STDLIB_LIMIT
    for file in sorted(folder.glob("*.py")):
        if file.name.startswith("_sysconfigdata"):  # build settings, which differ between machines
            continue
        texts.append(file.read_bytes()[:room])
        room -= len(texts[-1])
        if not room:
            break
    if not texts:
        raise ValueError(f"path = None: the standard library at {folder} holds no .py files; name a file or a folder")
    return texts


def _own(path: Path) -> list[bytes]:
    if not path.exists():
        raise ValueError(f"path = '{path}': does not exist; must be a file or a folder of files")
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _visible(file, path)]
    texts = [text for text in (file.read_bytes() for file in files) if text]
    if not texts:
        raise ValueError(f"path = '{path}': holds no text ({len(files)} files, 0 bytes)")
    return texts


def _visible(file: Path, folder: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _tensor(texts) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


@dataclass(frozen=True)
class Batches:
    """Windows at random places of a text: `data[step]` is (inputs, targets), (batch, tokens) int64 each.

    The targets are the inputs shifted by one token. A batch depends on seed and step alone. So a resumed run gets the
    batches it would have had, and two models with the same Batches see the same text. Iteration starts at step 0 and
    never ends.

    Args:
        text: (n,) of integers, n > tokens.
        batch, tokens: shape of a batch.
        seed: selects the sequence of batches.
        device: where the batches go.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """

    text: Tensor
    batch: int
    tokens: int
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        text = self.text
        for name, least in (("batch", 1), ("tokens", 1), ("seed", 0)):
            checked_integer(name, getattr(self, name), least)
        if text.dim() != 1 or text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise ValueError(f"text: {text.dtype} of shape {tuple(text.shape)}: must be 1-D and of integers")
        if len(text) <= self.tokens:
            raise ValueError(f"text: {len(text)} long: must be longer than tokens = {self.tokens}")

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        checked_integer("step", step, 0)
        start = np.random.default_rng((self.seed, step)).integers(len(self.text) - self.tokens, size=self.batch)
        window = torch.from_numpy(start)[:, None] + torch.arange(self.tokens + 1)
        tokens = self.text[window].to(self.device, torch.int64)
        return tokens[:, :-1], tokens[:, 1:]
