"""What the laboratory found, as one JSON file: verdicts.json, which the page shows and `compare` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from openmythos.lab.experiment import Experiment, Result, Run, Verdict
from openmythos.lab.machine import machine, versions
from openmythos.lab.store import Store
from openmythos.training.files import replacing

FILE = "verdicts.json"


def judged(experiment: Experiment, scale: str, seeds: Sequence[int], store: Store, failed: dict[str, str]) -> dict:
    """The entry of an experiment: what it is, what its results say, and how to get them again.

    Args:
        failed: "experiment/key" -> message.
    """
    settings = experiment.scales[scale]
    runs = experiment.runs(settings, seeds)
    results = present(experiment.name, runs, store)
    verdict = experiment.judge(settings, results) if results else Verdict("undecided", "no run is done yet")
    mine = {name: message for name, message in failed.items() if name.startswith(experiment.name + "/")}
    quick = scale == "smoke" or len(seeds) < experiment.seeds
    return {
        **{name: getattr(experiment, name) for name in ("number", "title", "claim", "rule", "limits")},
        "scale": scale,
        "seeds": list(seeds),
        "quick": quick,
        "outcome": verdict.outcome,
        "because": verdict.because,
        "figures": plain(dict(verdict.figures)),
        "columns": list(verdict.columns),
        "rows": plain([list(row) for row in verdict.rows]),
        "runs": len(runs),
        "missing": [run.key for run in runs if run.key not in {result.key for result in results}],
        "failed": {name: message.strip().splitlines()[-1] for name, message in mine.items()},
        "seconds": sum(result.seconds for result in results),
        "command": f"openmythos lab {experiment.name} --scale {scale} --seeds {len(seeds)}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
    }


def present(name: str, runs: Sequence[Run], store: Store) -> list[Result]:
    """The results that there are, in the order of the runs."""
    found = [store.result(name, run) for run in runs]
    return [result for result in found if result is not None]


def read(folder: Path) -> dict[str, dict]:
    """The entries of a folder by experiment; empty if there are none.

    Raises:
        ValueError: the file is none of the laboratory's.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text())
        return dict(tree["experiments"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not verdicts of the laboratory ({error})") from error


def write(folder: Path, entries: dict[str, dict]) -> None:
    """Writes the entries, by the number of the experiment, whole or not at all."""
    ordered = dict(sorted(entries.items(), key=lambda item: int(item[1]["number"].lstrip("E"))))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as part:
        part.write_text(json.dumps({"experiments": ordered}, indent=1, allow_nan=False) + "\n")


def plain(tree: Any) -> Any:
    """JSON data without NaN and infinities, which JSON has not: they become None."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
