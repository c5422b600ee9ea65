"""Loss of runs by step, tokens, seconds and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.training.plot import plot_runs


def main(arguments: Sequence[str]) -> None:
    """`openmythos plot RUN ... [out=FILE]`"""
    if {"-h", "--help"} & set(arguments):
        print(
            "usage: openmythos plot RUN ... [out=FILE]\n\nRUN: folder of a run. out: by default loss.png in the first."
        )
        return
    runs = [word for word in arguments if "=" not in word and not word.startswith("-")]
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    if not runs or set(options) - {"out"}:
        raise ValueError("usage: openmythos plot RUN ... [out=FILE]; RUN is the folder of a run")
    path = options.get("out", f"{runs[0]}/loss.png")
    plot_runs(runs, path)
    print(path)
