"""The record of a run: JSON lines, and where they are wanted TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openmythos.training.files import replacing

FILE = "log.jsonl"


class Log:
    """Appends records to `out`/log.jsonl. Each has "step", the steps done.

    Args:
        out: folder of the run.
        step: steps done so far. Records of later steps are those of a run that was killed after its last checkpoint:
            they are dropped, since the steps run again.
        tensorboard: also write TensorBoard's files to `out`/tensorboard, if it is installed.
        wandb: project of Weights & Biases; empty: none.
        config: the run's configuration, for Weights & Biases.

    Raises:
        ImportError: Weights & Biases is asked for and not installed. OSError.
    """

    def __init__(self, out: Path, step: int = 0, *, tensorboard: bool = False, wandb: str = "", config: Any = None):
        self._path = out / FILE
        kept = [line for line in read(out) if line["step"] <= step]
        with replacing(self._path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115 (open as long as the log is)
        self._writer = _tensorboard(out / "tensorboard", step) if tensorboard else None
        self._wandb = _wandb(wandb, out, config) if wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; numbers, strings, lists and None."""
        self._file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a run. A last line that a killed run left unfinished is left out."""
    path = out / FILE
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _wandb(project: str, out: Path, config: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("log.wandb needs the wandb package: pip install wandb") from error
    return wandb.init(project=project, name=out.name, id=out.name, resume="allow", config=config)
