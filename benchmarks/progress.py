"""Progress on stderr: a tqdm bar if tqdm is installed, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Shows what is running; `stage` yields a function to call after each unit of work."""

    def __init__(self):
        self.start = time.monotonic()

    @contextmanager
    def stage(self, label: str, total: int | None = None) -> Iterator[Callable[[], object]]:
        at = f"[{time.monotonic() - self.start:4.0f} s] {label}"
        if tqdm is not None:
            # The fixed width aligns the bars. In a log file every update is a line, so they are rare.
            every = 0.5 if sys.stderr.isatty() else 15
            with tqdm(total=total, desc=f"{at:<64}", ncols=110, ascii=True, mininterval=every, file=sys.stderr) as bar:
                yield bar.update
        else:
            print(at, "...", file=sys.stderr, flush=True)
            yield lambda: None
