"""Sharded checkpoints: every rank writes its part, and any number of ranks reads them.

    FOLDER/step-00000100/        complete: it got this name when everything in it was on disk
        about.json               format, version, step, the model's kind and configuration, the optimizer's layout
        extra.pt                 what the caller adds, and the optimizer's settings (rank 0's)
        .metadata, *.distcp      tensors, as torch.distributed.checkpoint writes them
    FOLDER/step-00000100.1/      the same step, saved again

Tensors go by the names of parameters, so it does not matter how a model was divided, then or now. What is being written
or deleted has a name of another form and is cleared away by the next save.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule

from openmythos.config import as_config, checked_integer
from openmythos.parallel.optimizer_state import OPTIMIZER, allocated, held, layout_of, matched, settings, take
from openmythos.parallel.plan import ranks
from openmythos.parallel.wrap import unwrap
from openmythos.training.checkpoint import KINDS, check_config, kind_of, load_model, save_checkpoint
from openmythos.training.checkpoint_files import PathLike
from openmythos.training.checkpoint_weights import raise_all, rotary_tables, tied
from openmythos.training.files import torch_save

# PyTorch says so at every save and load of a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT, VERSION = "openmythos-sharded-checkpoint", 1
MODEL = "model."
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?$")
_PART = ".part"

_writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
_pending: list[Future] = []  # at most one
_group: list[dist.ProcessGroup] = []  # of the writing threads


def save(
    folder: PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    extra: dict,
    step: int,
    *,
    keep: int = 3,
    wait: bool = True,
) -> None:
    """Writes a checkpoint, whole or not at all; every rank must call it.

    Args:
        folder: of all checkpoints of a run, the same on all ranks.
        model: as `parallelize` returned it, or a plain one.
        optimizer: of its parameters; None saves weights alone.
        extra: what else a run needs: numbers, strings, tensors and containers of them. Rank 0's is saved.
        step: steps trained.
        keep: how many complete checkpoints stay, this one included; older ones are deleted.
        wait: False returns once everything is copied to host memory. A thread writes; the next `save`, or `finish`,
            waits for it and raises what it raised.

    Raises:
        ValueError: naming the argument. OSError: nothing was saved, for example on a full disk; older checkpoints are
            as they were.
    """
    step, keep = checked_integer("step", step, 0), checked_integer("keep", keep, 1)
    finish()
    folder, inner = Path(folder), unwrap(model)
    _sharded_state(model)
    state = {**_weights(inner), **({} if optimizer is None else held(optimizer, inner))}
    layout = None if optimizer is None else layout_of(optimizer, inner).on_all_ranks()._asdict()
    kind, config = kind_of(inner), asdict(as_config(inner.cfg))
    about = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config, "step": step}
    about["optimizer"] = layout
    more = {"extra": extra, "settings": None if optimizer is None else settings(optimizer)}
    part = _begin(folder, step, about, more)
    if wait:
        _write(folder, part, state, keep, None)
        return
    copies = {key: x.to("cpu", copy=True) if isinstance(x, Tensor) else x for key, x in state.items()}
    if ranks() > 1 and not _group:
        _group.append(dist.new_group(backend="gloo"))  # of its own: training goes on meanwhile
    _pending.append(_writer.submit(_write, folder, part, copies, keep, _group[0] if _group else None))


def finish() -> None:
    """Waits until the checkpoint that a thread writes is complete.

    Raises:
        OSError: it could not be written.
    """
    while _pending:
        _pending.pop().result()


def load(
    folder: PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, step: int | None = None
) -> dict:
    """Loads the newest complete checkpoint in place; every rank must call it. The number of ranks and the plan may be
    others than those that saved it.

    Args:
        folder: of all checkpoints, or one of them.
        model: as for `save`; its weights keep their dtypes.
        optimizer: also loads its state; it must be of the same class over the same parameters.
        step: an older checkpoint.

    Returns:
        The `extra` saved, with "step" in it.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: it is of another model or optimizer, or damaged. Unless damage appears only in the tensors
            themselves, nothing has been changed then.
    """
    finish()
    path = _found(Path(folder), step)
    inner = unwrap(model)
    _sharded_state(model)
    about, more = _read(path)
    _check(path, about, inner)
    state: dict[str, Any] = dict(_weights(inner))
    reader = dcp.FileSystemReader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if optimizer is not None:
        new_settings = matched(path, layout_of(optimizer, inner), about["optimizer"], more["settings"])
        state |= allocated(inner, {key: value for key, value in stored.items() if key.startswith(OPTIMIZER)})
    raise_all(path, list(_misfits(state, stored)))
    try:
        dcp.load(state, storage_reader=reader, no_dist=ranks() == 1)
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(f"{path}: damaged, and the model may hold a part of it: {error}") from error
    if optimizer is not None:
        take(optimizer, inner, new_settings, state)
    return {**more["extra"], "step": about["step"]}


def latest(folder: PathLike) -> Path | None:
    """The newest complete checkpoint in a folder: that of the most steps, saved last."""
    complete = _complete(Path(folder))
    return complete[-1] if complete else None


def export(folder: PathLike, path: PathLike, *, step: int | None = None) -> None:
    """Writes the weights of a sharded checkpoint to one file, `.safetensors` or `.pt`, as `save_checkpoint` does.

    One process does it, with the whole model in host memory.

    Raises:
        As `load` and `openmythos.training.save_checkpoint`.
    """
    found = _found(Path(folder), step)
    about, _ = _read(found)
    cls, config = KINDS[about["kind"]]
    with torch.random.fork_rng([], device_type="cuda"):
        model = cls(config(**about["config"]))
    load(found, model)
    save_checkpoint(path, model, step=about["step"])


def import_(path: PathLike, folder: PathLike, step: int = 0) -> None:
    """Writes a file of `openmythos.training.save_checkpoint` as a sharded checkpoint, weights alone, of this `step`.

    Raises:
        As `openmythos.training.load_model` and `save`.
    """
    save(folder, load_model(path), None, {}, step)


def _weights(model: Any) -> dict[str, Tensor]:
    """The tensors to save by name; a tied head and the rotary tables follow from others."""
    left_out = tied(model).keys() | rotary_tables(model)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {MODEL + name: tensor.detach() for name, tensor in named.items() if name not in left_out}


def _sharded_state(model: nn.Module) -> None:
    """Gives modules of FSDP2 their own parameters back: after a forward without a backward some hold whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _begin(folder: Path, step: int, about: dict, more: dict) -> Path:
    """A new part, the same on all ranks, with all but the tensors in it. Leftovers are deleted."""
    answer: list[Any] = [None, None]
    if ranks() == 1 or dist.get_rank() == 0:
        part = folder / f".step-{step:08d}.{secrets.token_hex(8)}{_PART}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f".*{_PART}"):
                shutil.rmtree(old, ignore_errors=True)
            part.mkdir()
            (part / "about.json").write_text(json.dumps(about))
            torch_save(more, part / "extra.pt")
            answer[0] = str(part)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            answer[1] = str(error), error.errno
    if ranks() > 1:
        dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise _not_saved(folder, *answer[1])
    return Path(answer[0])


def _write(folder: Path, part: Path, state: dict, keep: int, group: dist.ProcessGroup | None) -> None:
    """Writes the tensors, gives the part its name and deletes what is too old."""
    alone, error = ranks() == 1, None
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(part), process_group=group, no_dist=alone)
    except (Exception, dcp.CheckpointException) as raised:  # the latter with every rank's own within
        error = str(getattr(raised, "failures", raised)), _number_of(raised)
    if alone or dist.get_rank() == 0:
        try:
            if error is None:
                _complete_part(folder, part)
                for old in _complete(folder)[:-keep]:
                    gone = old.with_name(f".{old.name}.{secrets.token_hex(4)}{_PART}")
                    os.replace(old, gone)
                    shutil.rmtree(gone)
        except OSError as raised:
            error = str(raised), raised.errno
        finally:
            shutil.rmtree(part, ignore_errors=True)
    if not alone:
        told: list[Any] = [error]
        dist.broadcast_object_list(told, 0, group=group)
        error = error or told[0]
    if error is not None:
        raise _not_saved(folder, *error)


def _complete_part(folder: Path, part: Path) -> None:
    step = int(part.name.removeprefix(".step-").partition(".")[0])
    again = [_order(path)[1] for path in _complete(folder) if _order(path)[0] == step]
    name = f"step-{step:08d}" + (f".{max(again) + 1}" if again else "")
    for file in (*part.iterdir(), part):
        _sync(file)
    os.replace(part, folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _not_saved(folder: Path, reason: str, number: int | None) -> OSError:
    text = f"{folder}: no checkpoint was saved, older ones are as they were: {reason}"
    return OSError(number or errno.EIO, text)


def _number_of(raised: BaseException) -> int | None:
    """The errno among what the ranks raised."""
    inner = [raised, *(pair[0] for pair in getattr(raised, "failures", {}).values())]
    return next((e.errno for e in inner if isinstance(e, OSError) and e.errno), None)


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.match(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _complete(folder: Path) -> list[Path]:
    """All complete checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir()), key=_order)


def _found(folder: Path, step: int | None) -> Path:
    """The checkpoint to load, the same on all ranks."""
    answer: list[Any] = [None]
    if ranks() == 1 or dist.get_rank() == 0:
        complete = [folder] if (folder / "about.json").is_file() else _complete(folder)
        answer = [str(path) for path in complete if step is None or _order(path)[0] == step][-1:] or [None]
    if ranks() > 1:
        dist.broadcast_object_list(answer, 0)
    if answer[0] is None:
        raise FileNotFoundError(
            f"{folder}: holds no complete checkpoint" + ("" if step is None else f" of step {step}")
        )
    return Path(answer[0])


def _read(path: Path) -> tuple[dict, dict]:
    try:
        about = json.loads((path / "about.json").read_text())
        more = torch.load(path / "extra.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: damaged: {error.filename} is missing") from error
    except Exception as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        came = about.get("format"), about.get("version")
        raise ValueError(f"{path}: format and version are {came}, expected {(FORMAT, VERSION)}")
    return about, more


def _check(path: Path, about: dict, model: Any) -> None:
    """Raises unless the checkpoint is of a model like this one."""
    _, config = KINDS[about["kind"]]
    check_config(path, about["kind"], config(**about["config"]), kind_of(model), as_config(model.cfg))


def _misfits(state: dict[str, Any], stored: dict[str, Any]) -> Iterator[str]:
    """What the checkpoint lacks or has in another shape."""
    for key, want in state.items():
        if not isinstance(want, Tensor):
            continue
        came = stored.get(key)
        if not isinstance(came, TensorStorageMetadata):
            yield f"{key} is missing, expected {tuple(want.shape)}"
        elif came.size != want.shape:
            yield f"{key} is {tuple(came.size)}, expected {tuple(want.shape)}"
