"""The verdicts of `python -m tests.mutations`, in docs/mutations.csv: which fault was caught last, on which text."""

from __future__ import annotations

import csv
import hashlib
import threading
from pathlib import Path

from tests.mutations.mutation import ROOT, Mutation, families

FILE = ROOT / "docs" / "mutations.csv"
COLUMNS = ("family", "fault", "file", "verdict", "digest")


class Record:
    """Rows by the name of the fault; a row is written as soon as it is known, so that a run that is killed can go on.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path = FILE):
        self._path, self._lock = path, threading.Lock()
        self._rows: dict[str, dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                self._rows = {row["fault"]: row for row in csv.DictReader(file)}

    def faults(self) -> list[str]:
        """Names of the faults with a verdict."""
        return list(self._rows)

    def caught(self, mutation: Mutation) -> bool:
        """Whether this fault, in its file as the file is now, was caught."""
        row = self._rows.get(mutation.name)
        return row is not None and row["verdict"] == "caught" and row["digest"] == _digest(mutation)

    def add(self, family: str, mutation: Mutation, caught: bool) -> None:
        """Writes a verdict, and leaves out rows of faults that are no more."""
        verdict = "caught" if caught else "missed"
        with self._lock:
            self._rows[mutation.name] = dict(
                zip(COLUMNS, (family, mutation.name, mutation.file, verdict, _digest(mutation)))
            )
            order = {m.name: (name, place) for name, list_ in families().items() for place, m in enumerate(list_)}
            self._rows = {name: self._rows[name] for name in sorted(self._rows.keys() & order.keys(), key=order.get)}
            with self._path.open("w", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(self._rows.values())


def _digest(mutation: Mutation) -> str:
    """Of the fault and of its file; other files that the tests run are not followed."""
    text = "\0".join((mutation.old, mutation.new, mutation.tests, (ROOT / mutation.file).read_text()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
