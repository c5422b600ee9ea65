"""Optimizer state in a checkpoint: kept with the names of its parameters, checked against both before it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmythos.model import LanguageModel
from openmythos.training.checkpoint_files import PathLike
from openmythos.training.checkpoint_weights import describe, raise_all

# Quantities that the optimizers of torch.optim keep in the shape of a parameter. Others may have any shape: scalars,
# factors (Adafactor), one vector for all parameters (LBFGS).
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


def optimizer_entry(optimizer: torch.optim.Optimizer, model: LanguageModel) -> dict:
    """What a checkpoint holds of an optimizer: its class, parameter names per group, and state_dict."""
    layout = parameter_names(optimizer, model)
    return {"class": type(optimizer).__name__, "parameters": layout, "state": optimizer.state_dict()}


def load_optimizer(path: PathLike, saved: dict | None, optimizer: torch.optim.Optimizer, model: LanguageModel) -> None:
    """Loads an `optimizer_entry` into `optimizer`, in place.

    Raises:
        ValueError: if it does not fit, before anything is changed.
    """
    kind, layout = type(optimizer).__name__, parameter_names(optimizer, model)
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
    raise_all(path, problems)
    optimizer.load_state_dict(saved["state"])
    # PyTorch casts all state of a parameter to its dtype, scalars (NAdam's product, ASGD's rate) included: undo that.
    owners = dict(zip(_numbers(saved["state"]), (p for group in optimizer.param_groups for p in group["params"])))
    for number, entries in saved["state"]["state"].items():
        now = optimizer.state[owners[number]]
        for quantity, value in entries.items():
            if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != now[quantity].dtype:
                now[quantity] = value.to(now[quantity].device)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters in each group: what the numbers in an optimizer's state_dict stand for.

    Raises:
        ValueError: a parameter is not the model's.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    unknown = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if unknown:
        raise ValueError(f"optimizer: {len(unknown)} of its parameters are not the model's, expected none such")
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _numbers(state: dict) -> list[int]:
    """The numbers that an optimizer's state_dict uses for parameters, in the order of its groups."""
    return [number for group in state["param_groups"] for number in group["params"]]


def _state_problems(state: dict, names: list[str], model: LanguageModel, kind: type) -> list[str]:
    """State tensors of a wrong shape; `load_state_dict` would accept them."""
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
                problems.append(f"optimizer: {quantity} of {name} is {describe(value)}, expected {tuple(want)}")
    return problems


def _sizes(layout) -> str:
    return " + ".join(str(len(group)) for group in layout) if isinstance(layout, list) else repr(layout)
