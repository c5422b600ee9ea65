"""What compilers print: a copy of it, at the level of the file descriptors that they inherit, and its first error."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def heard(lines: list[str]) -> Iterator[None]:
    """Within the context, output of this process and its children goes to standard output and, by lines, to `lines`."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    reader, writer = os.pipe()

    def listen():
        with os.fdopen(reader, "rb") as pipe:
            for line in pipe:
                lines.append(line.decode(errors="replace").rstrip())
                os.write(out, line)

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        listening.join(timeout=10)  # a compiler cache's server may keep the pipe open
        if not listening.is_alive():
            os.close(out)
        os.close(err)


def first_error(lines: list[str]) -> str:
    """The first line of a compiler's output that reports an error, or ""."""
    said = re.compile(r"\berror\b ?[:C]|: not found|\bkilled\b|no space left|cannot find -l", re.IGNORECASE)
    return next((line.strip()[:300] for line in lines if said.search(line)), "")
