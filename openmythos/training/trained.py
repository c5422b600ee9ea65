"""What a run has left: its model, its text, its tokenizer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from openmythos.model import LanguageModel
from openmythos.training.checkpoint import load_model


def load_run(folder: str | Path, fast: bool = True, device: str = "auto") -> tuple[LanguageModel, dict[str, Any]]:
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
    model = load_model(folder / "model.pt").eval()
    kind = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    model = model.to(kind)
    if fast:
        importlib.import_module("openmythos_kernels").accelerate(model)
    return model, json.loads((folder / "config.json").read_text())
