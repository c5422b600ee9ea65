"""Where text comes from: files, folders, JSON lines, data sets of the Hugging Face Hub, the standard library."""

from __future__ import annotations

import io
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

HUB = "hf:"

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


def documents(sources: Iterable[str], text_key: str, max_document: int) -> Iterator[str]:
    """The documents of all sources, in a fixed order; none is empty.

    Args:
        sources: of each, one of
            - a file: one document, or with the ending `.jsonl` one per line, the string under `text_key`;
            - a folder: its files in sorted order, hidden ones and those that hold a zero byte left out;
            - "hf:NAME[:CONFIG[:SPLIT]]": the rows of a data set of the Hugging Face Hub, streamed; split "train";
            - "stdlib": the modules of the running Python, without tests and tables.
        text_key: the key of the text in JSON lines and data sets.
        max_document: longer texts are cut at the end of a line after so many characters, or after twice as many
            without one. So a text of any size passes through in little memory.

    Bytes that are no UTF-8 become U+FFFD; line ends stay as they are.

    Raises:
        ValueError: there is no such source, or one holds no text. ImportError: hf: without the `datasets` package.
    """
    for source in sources:
        empty = True
        for document in _documents(source, text_key, max_document):
            empty = False
            yield document
        if empty:
            raise ValueError(f"sources: {source!r} holds no text")


def check(sources: Iterable[str]) -> None:
    """Raises what `documents` would raise for sources that do not exist, at once."""
    for source in sources:
        if source.startswith(HUB):
            _datasets(source)
        elif source != "stdlib":
            _path(source)


def _documents(source: str, text_key: str, max_document: int) -> Iterator[str]:
    if source.startswith(HUB):
        for text in _hub(source, text_key):
            yield from _pieces(io.StringIO(_whole(text), newline="\n"), max_document)
        return
    for file in _files(source):
        with open(file, encoding="utf-8-sig", errors="replace", newline="\n") as opened:
            if file.suffix == ".jsonl":
                for text in _lines(file, opened, text_key):
                    yield from _pieces(io.StringIO(_whole(text), newline="\n"), max_document)
            else:
                yield from _pieces(opened, max_document)


def _pieces(file: TextIO, size: int) -> Iterator[str]:
    while piece := file.read(size):
        if len(piece) == size:
            piece += file.readline(size)
        yield piece


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lines(file: Path, opened: TextIO, text_key: str) -> Iterator[str]:
    for number, line in enumerate(opened, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: is no JSON: {error}") from error
            yield _text(row, text_key, f"{file}:{number}")


def _hub(source: str, text_key: str) -> Iterator[str]:
    name, config, split, *more = *source.removeprefix(HUB).split(":"), "", ""
    if not name or any(more):
        raise ValueError(f"sources: {source!r}: must be hf:NAME[:CONFIG[:SPLIT]]")
    rows = _datasets(source).load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows):
        yield _text(row, text_key, f"{source}, row {number}")


def _text(row: Any, key: str, place: str) -> str:
    if isinstance(row, dict) and isinstance(row.get(key), str):
        return row[key]
    had = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{place}: must be an object with a string under text_key = {key!r}; it has {had}")


def _files(source: str) -> Iterator[Path]:
    if source == "stdlib":
        yield from _stdlib()
        return
    path = _path(source)
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.is_file() and not _is_binary(file):
            yield file


def _path(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        raise ValueError(f"sources: {source!r} does not exist; must be a file, a folder, hf:NAME or stdlib")
    if path.is_file() and _is_binary(path):
        raise ValueError(f"sources: {source!r} holds a zero byte; must be text")
    return path


def _is_binary(file: Path) -> bool:
    with open(file, "rb") as opened:
        return b"\0" in opened.read(8192)


def _stdlib() -> Iterator[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(folder.iterdir()):
        if entry.name in _LEFT_OUT:  # asked before looking into it: site-packages is large
            continue
        for file in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
            left_out = _LEFT_OUT.intersection(file.relative_to(folder).parts)
            # _sysconfigdata holds build settings, which differ between machines.
            if file.suffix == ".py" and not left_out and not file.name.startswith("_sysconfigdata"):
                yield file


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"sources: {source!r} needs the datasets package: pip install datasets") from error
    return datasets
