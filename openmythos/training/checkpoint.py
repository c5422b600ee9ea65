"""Checkpoints: written in one piece or not at all, and checked in full before a model is touched.

A `.pt` file (any suffix but `.safetensors`) is a `torch.save`d dict, read with `weights_only=True`:

    format, version     "openmythos-checkpoint", 1
    kind, config        "OpenMythos" or "DenseTransformer", and its configuration as a dict
    model               the state_dict
    optimizer           None, or {class, parameters: names per group, state: its state_dict}
    step                steps trained

A `.safetensors` file holds the weights alone, with format, version, kind, config, step and a checksum as JSON in its
metadata. The format does not store tensors that share memory, and old readers know no complex numbers. So the tied head
and the rotary tables stay out, and loading restores them from the model.

A plain state_dict of the same parameter names loads, too (`torch.save(model.state_dict(), path)` or safetensors),
open-mythos' files among them. Floating-point weights are converted to the dtype of the model.

Rotary tables are never loaded, since the configuration determines them. But a file's tables must agree with the
model's: in a file without a configuration they alone tell its rope_theta. Of tables that lost their imaginary part to
`.to(torch.bfloat16)`, the real part is compared.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmythos.baseline import DenseConfig, DenseTransformer
from openmythos.config import MythosConfig, as_config, checked_integer
from openmythos.model import LanguageModel, OpenMythos
from openmythos.training.checkpoint_files import PathLike, checksum, read, write_safetensors, write_torch
from openmythos.training.checkpoint_optimizers import load_optimizer, optimizer_entry
from openmythos.training.checkpoint_weights import as_state_dict, match, raise_all, rotary_tables, tied

FORMAT, VERSION = "openmythos-checkpoint", 1
KINDS: dict[str, tuple[Any, type[MythosConfig]]] = {
    "OpenMythos": (OpenMythos, MythosConfig),
    "DenseTransformer": (DenseTransformer, DenseConfig),
}


def save_checkpoint(
    path: PathLike, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None, step: int = 0
) -> None:
    """Writes a checkpoint; a file already at `path` is replaced only once the new one is complete on disk.

    Args:
        path: the file to write; with the suffix `.safetensors`, weights alone.
        model: an OpenMythos or DenseTransformer, accelerated or not.
        optimizer: saves its state, too, for resuming; not in `.safetensors`.
        step: steps trained.

    Raises:
        ValueError: naming the argument. ImportError without the safetensors package; OSError.
    """
    path = Path(path)
    step = checked_integer("step", step, 0)
    kind, config = kind_of(model), asdict(as_config(model.cfg))
    head = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config, "step": step}
    if path.suffix == ".safetensors":
        if optimizer is not None:
            raise ValueError(f"optimizer: '{path}' holds weights alone, expected None, or another suffix, e.g. .pt")
        left_out = tied(model).keys() | rotary_tables(model)
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in left_out}
        write_safetensors(path, weights, head)
    else:
        entry = None if optimizer is None else optimizer_entry(optimizer, model)
        write_torch(path, {**head, "model": dict(model.state_dict()), "optimizer": entry})


def load_checkpoint(path: PathLike, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Loads the weights, and the optimizer state if an optimizer is given, in place.

    Returns:
        The steps trained; 0 for a plain state_dict.

    Raises:
        ValueError: naming the file, the key, what came and what was expected. Model and optimizer are then unchanged
            to the last bit. ImportError without the safetensors package; OSError.
    """
    kind = kind_of(model)
    saved = _read(Path(path))
    if saved.cfg is not None:
        check_config(path, saved.kind, saved.cfg, kind, as_config(model.cfg))
    weights = match(path, saved.weights, model)
    if optimizer is not None:
        load_optimizer(path, saved.optimizer, optimizer, model)
    model.load_state_dict(weights)
    return saved.step


def load_model(path: PathLike) -> LanguageModel:
    """Builds the model of a `save_checkpoint` file, on the CPU, each weight in the dtype it has in the file.

    Raises:
        ValueError: as `load_checkpoint`, and for files without a configuration (plain state_dicts).
    """
    saved = _read(Path(path))
    if saved.cfg is None or saved.kind is None:
        raise ValueError(
            f"{path}: a plain state_dict, without configuration; build the model and use load_checkpoint(path, model)"
        )
    with torch.random.fork_rng([], device_type="cuda"):  # the initialization is overwritten: draw nothing for it
        model = KINDS[saved.kind][0](saved.cfg)
    weights = match(path, saved.weights, model)
    for name, p in model.named_parameters():
        p.data = p.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model


class _Saved(NamedTuple):
    weights: dict[str, Tensor]
    kind: str | None = None  # kind and cfg are None for a plain state_dict
    cfg: MythosConfig | None = None
    optimizer: dict | None = None
    step: int = 0


def _read(path: Path) -> _Saved:
    """The file's content, well formed but not yet compared with a model."""
    content = read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a checkpoint or a state_dict")
    if not (isinstance(content.get("format"), str) and content["format"] == FORMAT):
        return _Saved(as_state_dict(path, content))
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version is {content.get('version')!r}, expected {VERSION}")
    kind, config, step, optimizer = (content.get(key) for key in ("kind", "config", "step", "optimizer"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path}: step is {step!r}, expected an integer >= 0")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config is a {type(config).__name__}, expected a dict")
    if not isinstance(optimizer, (dict, type(None))):
        raise ValueError(f"{path}: optimizer is a {type(optimizer).__name__}, expected a dict or None")
    try:
        cfg = KINDS[kind][1](**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: config: {error}") from error
    weights = as_state_dict(path, content.get("model"))
    if "checksum" in content and content["checksum"] != (found := checksum(weights)):
        raise ValueError(f"{path}: damaged: checksum is {found}, expected {content['checksum']}")
    return _Saved(weights, kind, cfg, optimizer, step)


def check_config(path: PathLike, came_kind: str | None, came_cfg: MythosConfig, kind: str, cfg: MythosConfig) -> None:
    """Raises ValueError unless a checkpoint's model is of this kind and configuration."""
    if came_kind != kind:
        raise ValueError(f"{path}: holds a model of kind {came_kind}, expected {kind}")
    pairs = [(f.name, getattr(came_cfg, f.name), getattr(cfg, f.name)) for f in fields(cfg)]
    raise_all(
        path,
        [f"config.{name} is {came!r}, expected the model's {want!r}" for name, came, want in pairs if came != want],
    )


def kind_of(model) -> str:
    """The name of a model's kind; ValueError if it is none of openmythos."""
    for kind, (cls, cfg_cls) in KINDS.items():
        # An accelerated model of open-mythos is an OpenMythos and keeps its own configuration object.
        if isinstance(model, cls) and (cls is OpenMythos or isinstance(model.cfg, cfg_cls)):
            return kind
    raise ValueError(f"model: got {type(model).__name__}, expected {' or '.join(KINDS)} of openmythos")
