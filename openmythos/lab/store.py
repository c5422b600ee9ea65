"""Results on disk: one JSON file a run, written whole or not at all, found again by what the run depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from openmythos.lab.experiment import Result, Run
from openmythos.lab.version import code_digest
from openmythos.training.files import replacing


class Store:
    """The results below a folder: FOLDER/runs/EXPERIMENT/KEY-DIGEST.json.

    A result is that of a run if experiment, key, settings and code are the same; the digest stands for the last two.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.models = self.folder / "models"  # for models that several experiments read

    def path(self, experiment: str, run: Run) -> Path:
        """Where the run's result is or will be."""
        content = json.dumps([run.settings, code_digest(run.compute)], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return self.folder / "runs" / experiment / f"{run.key}-{digest}.json"

    def result(self, experiment: str, run: Run) -> Result | None:
        """The result of a run, None if there is none.

        Raises:
            ValueError: the file is damaged; a run that was killed leaves none.
        """
        path = self.path(experiment, run)
        if not path.exists():
            return None
        try:
            tree = json.loads(path.read_text())
            return Result(tree["key"], tree["settings"], tree["found"], tree["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not the result of a run ({error}); delete it, and it is computed again"
            ) from error


def save(path: Path, run: Run, found: dict[str, Any], seconds: float, versions: dict[str, str]) -> None:
    """Writes the result of a run.

    Raises:
        TypeError: `found` is not JSON data.
    """
    tree = {"key": run.key, "settings": run.settings, "found": found, "seconds": seconds, "versions": versions}
    text = json.dumps(tree, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text)
