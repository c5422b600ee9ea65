"""Files that are written in one piece or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that replaces it once it is complete.

    A link stays a link: the file it points to is replaced. The mode of the old file is kept. The temporary name is
    unique, as several threads may save to one path.
    """
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb"):
            mode = stat.S_IMODE((path if path.exists() else part).stat().st_mode)
        part.chmod(0o600)  # private until complete, and writable for us whatever the old file's mode
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def torch_save(content: Any, path: Path) -> None:
    """`torch.save`, of which a full disk is an OSError; PyTorch's own is a RuntimeError without the reason.

    Raises:
        OSError: the file could not be written.
    """
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        before: BaseException | None = error
        while before is not None and not isinstance(before, OSError):
            before = before.__context__
        if before is None:
            raise
        raise before from None
