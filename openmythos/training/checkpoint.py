"""Checkpoints: written in one piece or not at all, and checked in full before a model is touched.

A `.pt` file (any suffix but `.safetensors`) is a `torch.save`d dict, read with `weights_only=True`:

    format, version     "openmythos-checkpoint", 1
    kind, config        "OpenMythos" or "DenseTransformer", and its configuration as a dict
    model               the state_dict
    optimizer           None, or {class, parameters: names per group, state: its state_dict}
    step                steps trained

A `.safetensors` file holds the weights alone, with format, version, kind, config, step and a checksum as JSON
in its metadata. It has no place for tensors that share memory, and old readers know no complex numbers: the
head that is tied to the embedding and the rotary tables stay out, and are restored from the model.

What can be loaded besides: a plain state_dict of the same parameter names (`torch.save(model.state_dict(), path)`
or safetensors), open-mythos' files among them. Floating-point weights are converted to the dtype of the model.

Rotary tables are never loaded, since the configuration determines them, but a file's must agree with the model's:
where a file holds no configuration they are all that tells of its rope_theta. Tables that lost their imaginary
part to a `.to(torch.bfloat16)` are compared by what is left.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple, Union

import torch
from torch import Tensor

from openmythos.baseline import DenseConfig, DenseTransformer
from openmythos.config import MythosConfig, as_config, whole_number
from openmythos.model import LanguageModel, OpenMythos

FORMAT, VERSION = "openmythos-checkpoint", 1
_KINDS = {"OpenMythos": (OpenMythos, MythosConfig), "DenseTransformer": (DenseTransformer, DenseConfig)}
_KEY = "openmythos"  # of the metadata in a .safetensors file

PathLike = Union[str, os.PathLike]


def save_checkpoint(
    path: PathLike, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None, step: int = 0
) -> None:
    """Writes a checkpoint; a file already at `path` is replaced only once the new one is complete on disk.

    Args:
        path: where to; `.safetensors` for weights alone.
        model: an OpenMythos or DenseTransformer, with swapped modules or without.
        optimizer: its state is saved too, for resuming; not in `.safetensors`.
        step: steps trained.

    Raises:
        ValueError: naming the argument; ImportError without the safetensors package; OSError.
    """
    path = Path(path)
    if (number := whole_number(step)) is None or number < 0:
        raise ValueError(f"step = {step!r}: must be an integer >= 0")
    kind, config = _kind(model), asdict(as_config(model.cfg))
    head = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config, "step": number}
    if path.suffix == ".safetensors":
        if optimizer is not None:
            raise ValueError(f"optimizer: '{path}' holds weights alone, expected None, or another suffix, e.g. .pt")
        save_file = _safetensors().torch.save_file
        shared, tables = _tied(model), _tables(model)
        weights = {
            key: tensor.contiguous()
            for key, tensor in model.state_dict().items()
            if key not in shared and key not in tables
        }
        metadata = {_KEY: json.dumps({**head, "checksum": _checksum(weights)})}
        with _whole(path) as part:
            save_file(weights, part, metadata)
        return
    saved = None
    if optimizer is not None:
        layout = _layout(optimizer, model)
        saved = {"class": type(optimizer).__name__, "parameters": layout, "state": optimizer.state_dict()}
    with _whole(path) as part:
        torch.save({**head, "model": dict(model.state_dict()), "optimizer": saved}, part)


def load_checkpoint(path: PathLike, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Loads weights, and optimizer state where an optimizer is given, in place.

    Returns:
        The steps trained; 0 for a plain state_dict.

    Raises:
        ValueError: one that names the file, the key, what came and what was expected. Model and optimizer
            are then unchanged to the last bit. ImportError without the safetensors package; OSError.
    """
    kind = _kind(model)
    saved = _read(Path(path))
    if saved.cfg is not None:
        _check_config(path, saved, kind, as_config(model.cfg))
    weights = _match(path, saved.weights, model)
    if optimizer is not None:
        _load_optimizer(path, saved.optimizer, optimizer, model)
    model.load_state_dict(weights)
    return saved.step


def load_model(path: PathLike) -> LanguageModel:
    """Builds the model that a checkpoint of `save_checkpoint` holds, on the CPU, each weight in its dtype in the file.

    Raises:
        ValueError: as `load_checkpoint`, and for files without a configuration (plain state_dicts).
    """
    saved = _read(Path(path))
    if saved.cfg is None:
        raise ValueError(
            f"{path}: a plain state_dict, without configuration; build the model and use load_checkpoint(path, model)"
        )
    with torch.random.fork_rng([], device_type="cuda"):  # an initialisation that is overwritten takes no random numbers
        model = _KINDS[saved.kind][0](saved.cfg)
    weights = _match(path, saved.weights, model)
    for name, p in model.named_parameters():
        p.data = p.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model


class _Saved(NamedTuple):
    weights: dict[str, Tensor]
    kind: str | None = None  # this and cfg are None for a plain state_dict
    cfg: MythosConfig | None = None
    optimizer: dict | None = None
    step: int = 0


def _read(path: Path) -> _Saved:
    """The file's content, in the right form but not yet compared with any model."""
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a checkpoint or a state_dict")
    if not (isinstance(content.get("format"), str) and content["format"] == FORMAT):
        return _Saved(_state_dict(path, content))
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version is {content.get('version')!r}, expected {VERSION}")
    kind, config, step, optimizer = (content.get(key) for key in ("kind", "config", "step", "optimizer"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{path}: kind is {kind!r}, expected one of {', '.join(_KINDS)}")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path}: step is {step!r}, expected an integer >= 0")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config is a {type(config).__name__}, expected a dict")
    if not isinstance(optimizer, (dict, type(None))):
        raise ValueError(f"{path}: optimizer is a {type(optimizer).__name__}, expected a dict or None")
    try:
        cfg = _KINDS[kind][1](**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: config: {error}") from error
    weights = _state_dict(path, content.get("model"))
    if "checksum" in content and content["checksum"] != _checksum(weights):
        raise ValueError(f"{path}: damaged: checksum is {_checksum(weights)}, expected {content['checksum']}")
    return _Saved(weights, kind, cfg, optimizer, step)


def _read_torch(path: Path):
    with open(path, "rb") as file:  # what is wrong with opening it stays an OSError
        try:
            # torch.load does not look at the checksums that torch.save wrote.
            damaged = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None
            if damaged is None:
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # pickles fail in every possible way
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{path}: cannot be read: damaged, no torch.save file, or one that holds more than tensors, numbers, "
                f"strings and containers of them (code in a file is never run): {type(error).__name__}: {reason}"
            ) from error
    raise ValueError(f"{path}: damaged: the checksum of its part '{damaged}' is wrong")


def _read_safetensors(path: Path) -> dict:
    safetensors = _safetensors()
    for _ in range(100):
        before = _identity(path)
        try:
            content, failed = _open_safetensors(path, safetensors), None
        except ValueError as error:
            failed = error
        # The package opens a file twice, and another may have taken its place between.
        if _identity(path) == before:
            break
    if failed is not None:
        raise failed
    return content


def _identity(path: Path) -> tuple:
    with open(path, "rb") as file:  # what is wrong with opening it stays an OSError
        found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open_safetensors(path: Path, safetensors) -> dict:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is not iterable)
            metadata = (file.metadata() or {}).get(_KEY)
        head = None if metadata is None else json.loads(metadata)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {type(error).__name__}: {error}") from error
    return weights if head is None else {**head, "model": weights}


def _state_dict(path: Path, content) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no weights, expected a state_dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key!r} is a {type(value).__name__}, expected a checkpoint of save_checkpoint, "
                "or a state_dict: names with tensors"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{path}: {key}: {_say(value)}, {value.layout} on {value.device}, expected a dense tensor")
    return dict(content)


def _check_config(path: PathLike, saved: _Saved, kind: str, cfg: MythosConfig) -> None:
    if saved.kind != kind:
        raise ValueError(f"{path}: holds a model of kind {saved.kind}, expected {kind}")
    pairs = [(f.name, getattr(saved.cfg, f.name), getattr(cfg, f.name)) for f in fields(cfg)]
    differ = [(name, came, want) for name, came, want in pairs if came != want]
    _raise(path, [f"config.{name} is {came!r}, expected the model's {want!r}" for name, came, want in differ])


def _match(path: PathLike, weights: dict[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """The tensors for every key of the model's state_dict, or a ValueError with all that does not fit."""
    expected, tables = model.state_dict(), _tables(model)
    if any(tensor.is_meta for tensor in expected.values()):
        raise ValueError(f"{path}: the model is on the meta device, expected one with storage to load into")
    weights, problems = dict(weights), []
    for key, first in _tied(model).items():
        either = weights.get(first, weights.get(key))
        if either is None:
            continue  # reported as missing below
        if key in weights and not _same(weights[key], either):
            problems.append(f"{key} differs from {first}, expected the same: the model ties them")
        weights[key] = weights[first] = either
    for key, want in expected.items():
        problem = (_table_misfit if key in tables else _misfit)(weights.get(key), want)
        if problem:
            problems.append(f"{key}: {problem}")
    strangers = [key for key in weights if key not in expected]
    problems += [f"{key}: {_say(weights[key])} in the file, expected no such key" for key in strangers]
    _raise(path, problems)
    return {key: want if key in tables else weights[key] for key, want in expected.items()}


def _misfit(came: Tensor | None, want: Tensor) -> str | None:
    """Why a tensor cannot be copied to another, or None."""
    if came is None:
        return f"missing, expected {_say(want)}"
    same_kind = came.is_floating_point() == want.is_floating_point() and came.is_complex() == want.is_complex()
    if came.shape != want.shape or not same_kind:
        return f"{_say(came)} in the file, expected {_say(want)}"
    return None


def _table_misfit(came: Tensor | None, want: Tensor) -> str | None:
    """Why a rotary table in a file contradicts the model's, or None."""
    if came is None:
        return None
    if came.shape != want.shape or not (came.is_complex() or came.is_floating_point()):
        return f"{_say(came)} in the file, expected {_say(want)}"
    # Early positions suffice to tell one theta from another; at late ones libraries differ in rounding.
    came, want, tolerance = came[:256], want[:256].cpu(), 1e-3
    if not came.is_complex():
        came, want, tolerance = came.float(), want.real, 1e-2  # bfloat16's rounding
    if torch.allclose(came.to(want.dtype), want, rtol=0, atol=tolerance):
        return None
    return "other angles than the model's, expected those of its rope_theta"


def _load_optimizer(path: PathLike, saved: dict | None, optimizer: torch.optim.Optimizer, model: LanguageModel) -> None:
    """Checks all, then loads."""
    kind, layout = type(optimizer).__name__, _layout(optimizer, model)
    if saved is None:
        raise ValueError(f"{path}: optimizer: the file holds no state of one, expected that of {kind}")
    if saved.get("class") != kind:
        raise ValueError(f"{path}: optimizer: state of {saved.get('class')!r}, expected that of {kind}")
    if saved.get("parameters") != layout:
        raise ValueError(
            f"{path}: optimizer: its groups hold other parameters ({_sizes(saved.get('parameters'))}) than those of "
            f"the optimizer given, expected {_sizes(layout)} in the same order"
        )
    try:
        problems = _state_problems(saved["state"], [name for group in layout for name in group], model, type(optimizer))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: optimizer: expected the state_dict of an optimizer, got {error!r}") from error
    _raise(path, problems)
    optimizer.load_state_dict(saved["state"])
    # PyTorch casts what belongs to a parameter to its dtype, numbers (NAdam's product, ASGD's rate) included.
    owners = dict(zip(_numbers(saved["state"]), (p for group in optimizer.param_groups for p in group["params"])))
    for number, entries in saved["state"]["state"].items():
        now = optimizer.state[owners[number]]
        for quantity, value in entries.items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != now[quantity].dtype:
                now[quantity] = value.to(now[quantity].device)


def _numbers(state: dict) -> list[int]:
    """The numbers by which an optimizer's state_dict calls parameters, in the order of its groups."""
    return [number for group in state["param_groups"] for number in group["params"]]


# What optimizers of torch.optim keep in the shape of a parameter. Others' quantities may have any: numbers, factors
# (Adafactor), all parameters in one (LBFGS).
_SHAPED = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "ax",
    "prev",
    "step_size",
    "variance",
}


def _state_problems(state: dict, names: list[str], model: LanguageModel, kind: type) -> list[str]:
    """State tensors without the shape of their parameter, which `load_state_dict` would accept."""
    shaped = _SHAPED if kind.__module__.startswith("torch.optim") else ()
    name_of = dict(zip(_numbers(state), names, strict=True))
    shape_of = {name: p.shape for name, p in model.named_parameters()}
    problems = []
    for number, entries in state["state"].items():
        name = name_of[number]
        for quantity, value in entries.items():
            if not isinstance(value, Tensor):
                continue
            want = (
                shape_of[name] if quantity in shaped else torch.Size() if shaped and quantity == "step" else value.shape
            )
            if value.shape != want or value.is_meta:
                problems.append(f"optimizer: {quantity} of {name} is {_say(value)}, expected {tuple(want)}")
    return problems


def _layout(optimizer: torch.optim.Optimizer, model: LanguageModel) -> list[list[str]]:
    """The model's names for the parameters in each group: what the numbers in an optimizer's state mean."""
    names = {id(p): name for name, p in model.named_parameters()}
    strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if strangers:
        raise ValueError(f"optimizer: {len(strangers)} of its parameters are not the model's, expected none such")
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _kind(model) -> str:
    for kind, (cls, cfg_cls) in _KINDS.items():
        # An accelerated model of open-mythos is an OpenMythos and keeps its own configuration object.
        if isinstance(model, cls) and (cls is OpenMythos or isinstance(model.cfg, cfg_cls)):
            return kind
    raise ValueError(f"model: got {type(model).__name__}, expected {' or '.join(_KINDS)} of openmythos")


def _tied(model: LanguageModel) -> dict[str, str]:
    """For every further name of a parameter its first one: head.weight -> embed.weight."""
    first = {id(p): name for name, p in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in everywhere if first[id(p)] != name}


def _tables(model: LanguageModel) -> set[str]:
    return {name for name, buffer in model.named_buffers() if buffer.is_complex()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _sizes(layout) -> str:
    return " + ".join(str(len(group)) for group in layout) if isinstance(layout, list) else repr(layout)


def _raise(path: PathLike, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path}: " + "; ".join(problems[:5]) + more)


def _checksum(weights: dict[str, Tensor]) -> int:
    """CRC-32 of names and bytes; safetensors files carry none of their own."""
    crc = 0
    for key in sorted(weights):
        crc = zlib.crc32(key.encode(), crc)
        crc = zlib.crc32(weights[key].cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place if and when it is complete: at the end of a link, in the
    mode of the file that was there. Its name is nobody else's, as several may save to one path."""
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb"):
            mode = stat.S_IMODE((path if path.exists() else part).stat().st_mode)
        part.chmod(0o600)  # nobody else's until it is whole, and ours to write
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing .safetensors files needs the safetensors package: pip install safetensors"
        ) from error
    return safetensors
