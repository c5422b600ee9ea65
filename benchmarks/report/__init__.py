"""Turns the results into tables, figures and one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report.page import page
from benchmarks.report.tables import requirements, tables

__all__ = ["requirements", "tables", "write"]


def write(results: dict, folder: Path) -> list[Path]:
    """Writes results.json (every sample), index.html and, if matplotlib is installed, the figures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, why_not = draw(results)
    written = []
    for name, by_theme in figures.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(by_theme["light"])
    written += [folder / "results.json", folder / "index.html"]
    written[-2].write_text(json.dumps(results, indent=1))
    written[-1].write_text(page(results, figures, why_not))
    return written


def draw(results: dict) -> tuple[dict, str]:
    """Returns figure name -> theme -> PNG bytes, and the reason if there are none, else ""."""
    try:
        from benchmarks.report.plots import figures
    except ImportError as error:
        return {}, f"no figures: {error}; install the bench extra"
    return figures(results), ""
