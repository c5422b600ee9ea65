"""The writing half of `prepare`: tokens to shards, so that a run killed at any moment can go on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from openmythos.training.data.index import INDEX, SPLITS, UNFINISHED, Index, Part, check_size, parse, write
from openmythos.training.files import replacing


@dataclass
class Point:
    """Where the full shards of a split end in the stream of documents.

    Attributes:
        document: the number of the document that filled the last of them; -1 if there is none.
        taken: how many of that document's tokens, EOS included, are in full shards.
        digest: SHA-256 over the documents up to and including that one.
    """

    document: int = -1
    taken: int = 0
    digest: str = ""


class ShardWriter:
    """Collects the tokens of both splits and writes a shard whenever one is full.

    Only full shards are recorded before the end. The short ones at the end are recorded together with the finished
    index. So a run that goes on repeats at most the last shard of each split, and its files come out the same.
    """

    def __init__(self, out: Path, index: Index, points: dict[str, Point]):
        self.points = points
        self._out, self._index = out, index
        self._splits = {split: _Buffer(index) for split in SPLITS}
        self._record()

    def add(self, split: str, number: int, ids: np.ndarray, digest: str) -> None:
        """Appends document `number`, which an earlier run may have written in part, and EOS."""
        point, buffer = self.points[split], self._splits[split]
        taken = point.taken if number == point.document else 0
        if taken == 0:
            buffer.starts.append(buffer.filled)
        ids = np.append(ids, self._index.eos)
        while taken < len(ids):
            taken += buffer.put(ids[taken:])
            if buffer.filled == len(buffer.tokens):
                self._write(split)
                self.points[split] = Point(number, taken, digest)
                self._record()

    def finish(self, documents: int, digest: str) -> Index:
        """Writes what is left and the index.

        Raises:
            ValueError: a split that should have documents has none.
        """
        index, held_out = self._index, self._index.settings["held_out"]
        for split, buffer in self._splits.items():
            if not index.shards[split] and not buffer.filled and (split == "train" or held_out > 0):
                raise ValueError(
                    f"held_out = {held_out}: leaves split {split!r} without any of the {documents} documents; another "
                    "fraction or a smaller max_document gives it some"
                )
        for split, buffer in self._splits.items():
            if buffer.filled:
                self._write(split)
        index.documents, index.digest = documents, digest
        with _writing(self._out / INDEX):
            write(self._out / INDEX, index)
        (self._out / UNFINISHED).unlink()
        return index

    def _write(self, split: str) -> None:
        buffer, parts = self._splits[split], self._index.shards[split]
        name = f"{split}-{len(parts):05}"
        starts = np.array(buffer.starts, "<u8")
        checksum = _write_once(self._out / f"{name}.bin", buffer.tokens[: buffer.filled])
        starts_checksum = _write_once(self._out / f"{name}.starts.bin", starts)
        parts.append(Part(f"{name}.bin", buffer.filled, checksum, len(starts), f"{name}.starts.bin", starts_checksum))
        buffer.filled, buffer.starts = 0, []

    def _record(self) -> None:
        with _writing(self._out / UNFINISHED):
            points = {split: asdict(point) for split, point in self.points.items()}
            write(self._out / UNFINISHED, self._index, points=points)


def begun(out: Path, index: Index) -> tuple[Index, dict[str, Point], bool]:
    """What an earlier call has left in `out`: its index, where its full shards end, whether it had finished.

    Args:
        index: of this call, without shards; returned if there was no earlier call.

    Raises:
        ValueError: `out` holds other files, or was begun with other arguments, or misses a shard.
    """
    points = {split: Point() for split in SPLITS}
    for file in out.glob(".*.part"):  # left by a killed run
        file.unlink()
    path = next((out / name for name in (INDEX, UNFINISHED) if (out / name).exists()), None)
    if path is None:
        if any(out.iterdir()):
            raise ValueError(f"out = '{out}': holds files but no {INDEX}; must be a new or empty folder")
        return index, points, False
    found, more = parse(path)
    difference = _difference(found, index)
    if path.name == UNFINISHED:
        if difference and not any(found.shards.values()):  # nothing to lose: begin anew
            for file in [*out.glob("*.bin"), path]:
                file.unlink()
            return index, points, False
        points = {split: Point(**point) for split, point in more["points"].items()}
    if difference:
        raise ValueError(f"out = '{out}': was begun with {difference}; choose another folder, or delete this one")
    for part in (part for parts in found.shards.values() for part in parts):
        check_size(out, part, found)
    if path.name == INDEX:  # the run may have been killed before it could remove this
        (out / UNFINISHED).unlink(missing_ok=True)
    return found, points, path.name == INDEX


def _difference(found: Index, index: Index) -> str:
    if found.tokenizer.sha256 != index.tokenizer.sha256:
        return f"another tokenizer: {found.tokenizer.name!r} there, {index.tokenizer.name!r} here"
    for name, value in index.settings.items():
        if found.settings.get(name) != value:
            return f"{name} = {found.settings.get(name)!r}, not {value!r}"
    return ""


class _Buffer:
    """The shard of a split that is being filled."""

    def __init__(self, index: Index):
        self.tokens = np.empty(index.settings["shard_tokens"], index.numpy_dtype())
        self.filled = 0
        self.starts: list[int] = []

    def put(self, ids: np.ndarray) -> int:
        """Appends as many ids as there is room for, and returns how many."""
        count = min(len(ids), len(self.tokens) - self.filled)
        self.tokens[self.filled : self.filled + count] = ids[:count]
        self.filled += count
        return count


def _write_once(path: Path, content: np.ndarray) -> int:
    """Writes an array unless the file is there already, as after a kill before it could be recorded; its CRC-32."""
    data = content.view(np.uint8).data
    checksum = zlib.crc32(data)
    if not (path.exists() and path.stat().st_size == len(data) and zlib.crc32(path.read_bytes()) == checksum):
        with _writing(path), replacing(path) as part, open(part, "wb") as file:
            file.write(data)
    return checksum


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path}: cannot be written: {error.strerror}; what is there is whole, and the same call goes on",
        ) from error
