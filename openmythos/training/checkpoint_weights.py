"""Comparing the weights of a file with those of a model, before any is copied."""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.model import LanguageModel
from openmythos.training.checkpoint_files import PathLike


def as_state_dict(path: PathLike, content) -> dict[str, Tensor]:
    """`content` as a dict of dense tensors by name.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds no weights, expected a state_dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key!r} is a {type(value).__name__}, expected a checkpoint of save_checkpoint, "
                "or a state_dict: names with tensors"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(
                f"{path}: {key}: {describe(value)}, {value.layout} on {value.device}, expected a dense tensor"
            )
    return dict(content)


def match(path: PathLike, weights: dict[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """A tensor for every key of the model's state_dict.

    Raises:
        ValueError: listing all that does not fit.
    """
    expected, tables = model.state_dict(), rotary_tables(model)
    if any(tensor.is_meta for tensor in expected.values()):
        raise ValueError(f"{path}: the model is on the meta device, expected one with storage to load into")
    weights, problems = dict(weights), []
    for key, first in tied(model).items():
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
    unknown = [key for key in weights if key not in expected]
    problems += [f"{key}: {describe(weights[key])} in the file, expected no such key" for key in unknown]
    raise_all(path, problems)
    return {key: want if key in tables else weights[key] for key, want in expected.items()}


def tied(model: LanguageModel) -> dict[str, str]:
    """Every further name of a parameter -> its first name: head.weight -> embed.weight."""
    first = {id(p): name for name, p in model.named_parameters()}
    every_name = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every_name if first[id(p)] != name}


def rotary_tables(model: LanguageModel) -> set[str]:
    """The names of the model's rotary tables, its only complex buffers."""
    return {name for name, buffer in model.named_buffers() if buffer.is_complex()}


def describe(tensor: Tensor) -> str:
    """dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def raise_all(path: PathLike, problems: list[str]) -> None:
    """Raises one ValueError for all problems; it names the first five."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path}: " + "; ".join(problems[:5]) + more)


def _misfit(came: Tensor | None, want: Tensor) -> str | None:
    """Why `came` cannot be copied to `want`; None if it can."""
    if came is None:
        return f"missing, expected {describe(want)}"
    same_kind = came.is_floating_point() == want.is_floating_point() and came.is_complex() == want.is_complex()
    if came.shape != want.shape or not same_kind:
        return f"{describe(came)} in the file, expected {describe(want)}"
    return None


def _table_misfit(came: Tensor | None, want: Tensor) -> str | None:
    """Why a file's rotary table contradicts the model's; None if it does not, or the file has none."""
    if came is None:
        return None
    if came.shape != want.shape or not (came.is_complex() or came.is_floating_point()):
        return f"{describe(came)} in the file, expected {describe(want)}"
    # Early positions suffice to tell two thetas apart; at late ones libraries round differently.
    came, want, tolerance = came[:256], want[:256].cpu(), 1e-3
    if not came.is_complex():
        came, want, tolerance = came.float(), want.real, 1e-2  # rounded to bfloat16
    if torch.allclose(came.to(want.dtype), want, rtol=0, atol=tolerance):
        return None
    return "other angles than the model's, expected those of its rope_theta"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
