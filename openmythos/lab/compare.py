"""Two runs of the laboratory side by side."""

from __future__ import annotations

from pathlib import Path

from openmythos.lab.verdicts import FILE, read


def compare(a: str | Path, b: str | Path) -> str:
    """A table of verdicts and figures of two folders, with what changed marked by an asterisk.

    Raises:
        ValueError: a folder has no verdicts.
    """
    sides = []
    for name, folder in (("A", Path(a)), ("B", Path(b))):
        sides.append(read(folder))
        if not sides[-1]:
            raise ValueError(f"{name} = {folder}: holds no {FILE}; expected the folder of a run of the laboratory")
    rows: list[tuple[str, ...]] = [("", "", "A", "B", "B - A")]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        pair = [side.get(name) for side in sides]
        outcomes = [_outcome(entry) for entry in pair]
        rows.append((_mark(pair), name, *outcomes, ""))
        figures = [entry["figures"] if entry else {} for entry in pair]
        for figure in dict.fromkeys([*figures[0], *figures[1]]):
            was, now = (found.get(figure) for found in figures)
            change = "" if was is None or now is None else f"{now - was:+.4g}"
            rows.append(("", f"  {figure}", _number(was), _number(now), change))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _mark(pair: list) -> str:
    return "*" if None in pair or pair[0]["outcome"] != pair[1]["outcome"] else ""


def _outcome(entry: dict | None) -> str:
    if entry is None:
        return "-"
    seeds = len(entry["seeds"])
    return f"{entry['outcome']} ({entry['scale']}, {seeds} seed{'s' * (seeds != 1)}{', quick' * entry['quick']})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
