"""Pictures of runs: loss by step, tokens, seconds and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openmythos.training.log import FILE, read

AXES = (("step", "steps"), ("tokens", "tokens"), ("seconds", "seconds"), ("flops", "FLOPs"))


def plot_runs(runs: Sequence[str | Path], path: str | Path) -> None:
    """Draws the training loss (thin, smoothed) and the held-out loss (dots) of runs into one file. Needs matplotlib.

    Args:
        runs: folders with a log.jsonl.
        path: where to write; its suffix gives the format.

    Raises:
        ValueError: a folder holds no record of a run.
    """
    records = {}
    for run in map(Path, runs):
        records[run.name] = _curves(read(run))
        if not records[run.name][0]:
            raise ValueError(f"{run}: holds no {FILE} with a record; expected the folder of a run")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, panels = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, AXES):
        for number, (name, (steps, held_out)) in enumerate(records.items()):
            colour = f"C{number}"
            panel.plot(
                [line[key] for line in steps], _smooth([line["loss"] for line in steps]), color=colour, lw=1, label=name
            )
            panel.plot(
                [line[key] for line in held_out], [line["held_out"] for line in held_out], "o--", color=colour, ms=4
            )
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss, nats per token (dots: held-out text)")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curves(lines: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """The records of steps, and those of evaluations with what their step's record says."""
    steps = {line["step"]: line for line in lines if line.get("loss") is not None}
    held_out = [{**steps[line["step"]], **line} for line in lines if "held_out" in line and line["step"] in steps]
    return list(steps.values()), held_out


def _smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Exponential averages, without the pull of the start."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        found.append(total / weight)
    return found
