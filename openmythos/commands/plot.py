"""Loss of runs by step, tokens, seconds and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.commands.parsing import asks_help, split
from openmythos.training.plot import plot_runs


def main(arguments: Sequence[str]) -> None:
    """`openmythos plot RUN ... [out=FILE]`"""
    if asks_help(arguments):
        print(
            "usage: openmythos plot RUN ... [out=FILE]\n\nRUN: folder of a run. out: by default loss.png in the first."
        )
        return
    runs, given = split(arguments)
    options = dict(word.partition("=")[::2] for word in given)
    if not runs or set(options) - {"out"}:
        raise ValueError("usage: openmythos plot RUN ... [out=FILE]; RUN is the folder of a run")
    path = options.get("out", f"{runs[0]}/loss.png")
    plot_runs(runs, path)
    print(path)
