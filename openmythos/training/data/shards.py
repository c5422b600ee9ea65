"""Token shards as training data: any step's batch, computed from seed, step and rank alone."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.training.data.index import SPLITS, check_size, read_index
from openmythos.training.data.order import shuffled


class TokenShards:
    """Windows of a folder that `prepare` wrote: `data[step]` is (inputs, targets), (batch / ranks, tokens) int64 each.

    The documents of a split, EOS behind each, are one stream, cut into windows of tokens + 1 that overlap by one: no
    padding, and every token but the first is a target once. The targets are the inputs shifted by one token. What is
    left at the end, less than a window, is not used. A window may hold the ends and beginnings of several documents,
    and attention sees across them, as in GPT-2 and GPT-3.

    Windows of "train" come in a new random order every epoch, windows of "held_out" in the order of the stream; then
    they start again. Row r of a step is row `step * batch + r` of that sequence. So a batch depends on seed and step
    alone, a resumed run gets the batches it would have had, and the rows of all ranks, in the order of the ranks, are
    those of one rank. Iteration starts at step 0 and never ends.

    Args:
        folder: where the shards are; they are mapped, not read.
        split: "train" or "held_out".
        batch: rows of a step on all ranks together.
        tokens: length of a row.
        seed: selects the order.
        rank, ranks: which of how many equal parts of each batch.
        device: where the batches go.
        check: compare the checksums of all shards, which reads them once. Each rank takes its share of the shards.

    Attributes:
        index: what the folder says about itself.
        windows: the length of an epoch, in rows.

    Raises:
        ValueError: naming the argument, what came and what was expected; or the folder is not whole.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        split: str,
        batch: int,
        tokens: int,
        seed: int = 0,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: str | torch.device = "cpu",
        check: bool = True,
    ):
        for name, value, least in (
            ("batch", batch, 1), ("tokens", tokens, 1), ("seed", seed, 0), ("rank", rank, 0), ("ranks", ranks, 1)
        ):  # fmt: skip
            checked_integer(name, value, least)
        if split not in SPLITS:
            raise ValueError(f"split = {split!r}: must be one of {', '.join(SPLITS)}")
        if rank >= ranks:
            raise ValueError(f"rank = {rank}: must be < ranks = {ranks}")
        if batch % ranks:
            raise ValueError(f"batch = {batch}: must be a multiple of ranks = {ranks}")
        self.folder, self.split, self.batch, self.tokens, self.seed = Path(folder), split, batch, tokens, seed
        self.rank, self.ranks, self.device = rank, ranks, device
        self.index = read_index(self.folder)
        parts = self.index.shards[split]
        total = self.index.tokens(split)
        self.windows = (total - 1) // tokens
        if self.windows < 1:
            raise ValueError(f"tokens = {tokens}: split {split!r} of {folder} has {total} tokens; must be fewer")
        self._size = parts[0].tokens
        if any(part.tokens != self._size for part in parts[:-1]) or parts[-1].tokens > self._size:
            raise ValueError(f"{folder}: its shards differ in length: damaged; prepare it again")
        for part in parts:
            check_size(self.folder, part, self.index)
        if check:
            for part in parts[rank::ranks]:
                _compare(self.folder / part.file, part.checksum)
                _compare(self.folder / part.starts_file, part.starts_checksum)
        self._shards = [_map(self.folder / part.file, self.index.numpy_dtype()) for part in parts]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        step = checked_integer("step", step, 0)
        rows = self.batch // self.ranks
        first = step * self.batch + self.rank * rows
        batch = np.empty((rows, self.tokens + 1), np.int64)
        for row, window in zip(batch, self._windows(np.arange(first, first + rows))):
            self._read(int(window) * self.tokens, row)
        moved = torch.from_numpy(batch).to(self.device)
        return moved[:, :-1], moved[:, 1:]

    def check_vocabulary(self, cfg: Any) -> None:
        """Raises ValueError if a model of this configuration has no embedding for some token."""
        needed, name = self.index.vocab_size, self.index.tokenizer.name
        if cfg.vocab_size < needed:
            raise ValueError(
                f"vocab_size = {cfg.vocab_size}: must be >= {needed} for {self.folder}, made by tokenizer {name!r}"
            )

    def document(self, i: int) -> np.ndarray:
        """The tokens of document i of the split, without EOS, (n,) int64.

        Raises:
            IndexError: there is no such document.
        """
        counts = [part.documents for part in self.index.shards[self.split]]
        if not 0 <= i < sum(counts):
            raise IndexError(f"i = {i}: split {self.split!r} of {self.folder} has documents 0 .. {sum(counts) - 1}")
        start, end = self._start(i), self._start(i + 1)
        tokens = np.empty(end - start - 1, np.int64)
        self._read(start, tokens)
        return tokens

    def _start(self, i: int) -> int:
        """The place in the stream where document i begins; behind the last one, the end of the stream."""
        for shard, part in enumerate(self.index.shards[self.split]):
            if i < part.documents:
                return shard * self._size + int(_map(self.folder / part.starts_file, np.dtype("<u8"))[i])
            i -= part.documents
        return self.index.tokens(self.split)

    def _windows(self, rows: np.ndarray) -> np.ndarray:
        """The windows that stand at the given rows of the endless sequence."""
        epochs, places = np.divmod(rows, self.windows)
        if self.split != "train":
            return places
        for epoch in np.unique(epochs):
            now = epochs == epoch
            places[now] = shuffled(places[now], self.windows, self.seed, int(epoch))
        return places

    def _read(self, start: int, row: np.ndarray) -> None:
        """Fills a row with the tokens of the stream from `start` on."""
        done = 0
        while done < len(row):
            shard, offset = divmod(start + done, self._size)
            piece = self._shards[shard][offset : offset + len(row) - done]
            row[done : done + len(piece)] = piece
            done += len(piece)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r").view(np.ndarray)  # a slice of a memmap object costs more than the copy


def _compare(path: Path, checksum: int) -> None:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    if found != checksum:
        raise ValueError(f"{path}: damaged: its checksum is {found}, not {checksum}; delete the folder and prepare it")
