"""Optimizers: AdamW, or Muon for weight matrices with AdamW for the rest; averaged weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.halting import ACTHalting
from openmythos.injection import Injection
from openmythos.moe import MoEFFN
from openmythos.parallel.gradients import split_groups
from openmythos.training.schedule import Shape, learning_rate


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights follow gradients.

    No weight decay applies to 1-D parameters (norms, biases), embeddings, a head tied to one, and an injection's own
    parameters: its decay rates, step sizes and gains (A, dt, B, Parcae's C) must not be pulled to zero.

    Attributes:
        name: adamw, or muon: Muon (torch.optim.Muon) for the weight matrices inside blocks, AdamW for the rest.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        beta1: AdamW's decay rate of the mean gradient.
        beta2: AdamW's decay rate of the mean squared gradient.
        weight_decay: of weight matrices.
        clip: largest norm of the gradient of a step.
        schedule: shape of the learning rate after the warm-up. cosine: half a cosine down to the floor. constant. wsd:
            the peak, then a line down to the floor.
        warmup: steps of linear warm-up.
        decay: share of the steps, at the end of the run, in which wsd decays.
        floor: final learning rate as a fraction of the peak.
        ema: decay rate per step of the exponentially averaged weights, which evaluation then uses; 0: none are kept.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: Shape = "cosine"
    warmup: int = 10
    decay: float = 0.2
    floor: float = 0.1
    ema: float = 0.0

    def __post_init__(self) -> None:
        checked_integer("optimizer.warmup", self.warmup, 0)
        for name in ("lr", "muon_lr", "weight_decay", "clip", "floor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must be >= 0")
        for name in ("beta1", "beta2", "ema", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must be in [0, 1)")

    def share(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, as a share of its peak."""
        return learning_rate(step, steps, 1.0, self.warmup, self.floor, self.schedule, self.decay)


def make_optimizer(
    model: nn.Module,
    weight_decay: float = 0.1,
    config: OptimizerConfig | None = None,
    stochastic_rounding: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a configuration; without one AdamW with the default settings and this weight decay.

    Each group has the key "peak", its largest learning rate; the trainer sets the rates.

    Args:
        stochastic_rounding: AdamW rounds bfloat16 weights up or down at random, by their distance.

    Raises:
        ImportError: stochastic_rounding without torchao.
    """
    config = OptimizerConfig(weight_decay=weight_decay) if config is None else config
    exempt = {
        id(p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p.dim() < 2 or isinstance(module, (nn.Embedding, Injection))
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = muon_matrices(model) if config.name == "muon" else set()
    adamw = [
        {"params": [p for p in parameters if id(p) not in exempt | matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]
    adamw = [{**group, "peak": config.lr} for group in adamw if group["params"]]
    make = _rounding_adamw() if stochastic_rounding else partial(torch.optim.AdamW, fused=_on_gpu(parameters))
    rest = make(split_groups(adamw), lr=config.lr, betas=(config.beta1, config.beta2))
    if not matrices:
        return rest
    muon = torch.optim.Muon(
        [{"params": [p for p in parameters if id(p) in matrices], "peak": config.muon_lr}],
        lr=config.muon_lr,
        weight_decay=config.weight_decay,
    )
    return Together([muon, rest])


def _on_gpu(parameters: list[nn.Parameter]) -> bool:
    """Whether PyTorch's fused optimizers may take them."""
    return bool(parameters) and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _rounding_adamw() -> Any:
    try:
        from torchao.optim import _AdamW
    except ImportError as error:
        raise ImportError("precision.stochastic_rounding needs the torchao package: pip install torchao") from error
    return partial(_AdamW, bf16_stochastic_round=True)


def muon_matrices(model: nn.Module) -> set[int]:
    """Weight matrices that map activations to activations. Not routers and halting, whose outputs are decisions."""
    decisions = [m.router for m in model.modules() if isinstance(m, MoEFFN)]
    decisions += [m.halt for m in model.modules() if isinstance(m, ACTHalting)]
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and not any(m is one for one in decisions)]
    head = getattr(model, "head", None)
    return {id(m.weight) for m in linear if m is not head and m.weight.requires_grad} - tied


class Together(torch.optim.Optimizer):
    """Several optimizers as one: each steps its own parameters, one state_dict holds all states.

    Its groups are those of its parts, the same dicts. All share one state, in which each looks up its own parameters.
    """

    def __init__(self, parts: Iterable[torch.optim.Optimizer]):
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, {p: held for part in self.parts for p, held in part.state.items()})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise ValueError("closure: several optimizers cannot share one, expected None")
        for part in self.parts:
            part.step()
        return None

    def load_state_dict(self, state_dict: dict) -> None:
        groups = list(state_dict["param_groups"])
        for part in self.parts:
            mine = [groups.pop(0) for _ in part.param_groups]
            held = {n for group in mine for n in group["params"]}
            state = {n: value for n, value in state_dict["state"].items() if n in held}
            part.load_state_dict({"state": state, "param_groups": mine})
        self._share()


class Average:
    """Exponentially averaged weights.

    Args:
        model: the model to follow. decay: rate per step.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._model = model
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follows the weights after a step, counted from 0. Early averages forget faster, so that the start fades."""
        decay = min(self._decay, (1 + step) / (10 + step))
        live = dict(self._model.named_parameters())
        for name, held in self.weights.items():
            held.lerp_(live[name].detach(), 1 - decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes up averages that were saved."""
        for name, held in self.weights.items():
            held.copy_(weights[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the model's weights and the averages; a second call exchanges them back."""
        for name, p in self._model.named_parameters():
            held = self.weights[name].clone()
            self.weights[name].copy_(p)
            p.copy_(held)
