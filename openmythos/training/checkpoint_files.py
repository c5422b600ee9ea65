"""Checkpoint files on disk: written in one piece or not at all, read without running code, checked for damage."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from openmythos.training.files import replacing, torch_save

PathLike = str | os.PathLike

_METADATA = "openmythos"  # the key of our JSON in a .safetensors file's metadata


def read(path: Path):
    """The content of a file: a dict with "model", or whatever else a foreign file holds.

    Raises:
        ValueError: for a damaged file. ImportError without the safetensors package; OSError.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def write_torch(path: Path, content: dict) -> None:
    """Writes `content` with `torch.save`."""
    with replacing(path) as part:
        torch_save(content, part)


def write_safetensors(path: Path, weights: dict[str, Tensor], head: dict) -> None:
    """Writes `weights`, with `head` and their checksum as JSON in the metadata."""
    save_file = _safetensors().torch.save_file
    metadata = {_METADATA: json.dumps({**head, "checksum": checksum(weights)})}
    with replacing(path) as part:
        save_file(weights, part, metadata)


def checksum(weights: dict[str, Tensor]) -> int:
    """CRC-32 of names and bytes; safetensors files have none of their own."""
    crc = 0
    for key in sorted(weights):
        crc = zlib.crc32(key.encode(), crc)
        crc = zlib.crc32(weights[key].cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def _read_torch(path: Path):
    with open(path, "rb") as file:  # outside the try: failing to open stays an OSError
        try:
            # torch.load does not verify the checksums that torch.save wrote.
            damaged = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None
            if damaged is None:
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling can raise anything
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{path}: cannot be read: damaged, no torch.save file, or one that holds more than tensors, numbers, "
                f"strings and containers of them (code in a file is never run): {type(error).__name__}: {reason}"
            ) from error
    raise ValueError(f"{path}: damaged: the checksum of its part '{damaged}' is wrong")


def _read_safetensors(path: Path) -> dict:
    safetensors = _safetensors()
    for _ in range(100):
        before = _identity(path)
        try:
            content, failed = _open_safetensors(path, safetensors), None
        except ValueError as error:
            failed = error
        # The package opens a file twice; retry if another file took its place in between.
        if _identity(path) == before:
            break
    if failed is not None:
        raise failed
    return content


def _identity(path: Path) -> tuple:
    with open(path, "rb") as file:  # failing to open stays an OSError
        found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open_safetensors(path: Path, safetensors) -> dict:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()  # the file itself cannot be iterated over
            weights = {name: file.get_tensor(name) for name in names}
            metadata = (file.metadata() or {}).get(_METADATA)
        head = None if metadata is None else json.loads(metadata)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {type(error).__name__}: {error}") from error
    return weights if head is None else {**head, "model": weights}


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing .safetensors files needs the safetensors package: pip install safetensors"
        ) from error
    return safetensors
