"""What a run has left: its model, its text, its tokenizer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from openmythos.model import LanguageModel
from openmythos.training.checkpoint import load_model
from openmythos.training.ranks import Device, compute_device


def load_run(folder: str | Path, fast: bool = True, device: Device = "auto") -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a finished run, in eval mode, and the run's configuration as a tree of dicts.

    Args:
        folder: that of the run.
        fast: swap in the modules of openmythos_kernels.
        device: auto, cpu or cuda.

    Raises:
        ValueError: there is no finished run. OSError.
    """
    folder = Path(folder)
    for name in ("config.json", "model.pt"):
        if not (folder / name).exists():
            raise ValueError(f"RUN = {folder}: holds no {name}; expected the folder of a finished run")
    model = load_model(folder / "model.pt").eval().to(compute_device(device))
    if fast:
        importlib.import_module("openmythos_kernels").accelerate(model)
    return model, json.loads((folder / "config.json").read_text())
