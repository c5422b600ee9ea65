"""Initial weights that depend on a seed and on each parameter's name alone, so on no number of ranks.

A constructor draws all weights from one generator, in order: a rank would have to draw the whole model to know its own
part. Here every parameter has a generator of its own. A rank draws its parameters one by one, whole, and keeps its
shard. The distributions are those of the constructors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from openmythos.config import setting
from openmythos.injection import Injection
from openmythos.layers import RMSNorm
from openmythos.lora import LoRAAdapter
from openmythos.model import INITIAL_STD
from openmythos.moe import MoEFFN
from openmythos.recurrence import RecurrentBlock


@torch.no_grad()
def initialize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights anew, in place, and sets router biases to 0. Weights must be on the device where they stay,
    and sharded if they will be.

    Numbers depend on the kind of device, as PyTorch's generators do.

    Raises:
        ValueError: for a module whose initial weights are not known.
    """
    done: set[int] = set()
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in done}
        if own:
            values = _drawn(name, module, seed, next(iter(own.values())).device)
            for parameter_name, p in own.items():
                _keep(p, values[parameter_name])
                done.add(id(p))
        if isinstance(module, MoEFFN):
            module.router_bias.zero_()
    for module in model.modules():
        if isinstance(module, RecurrentBlock) and (halt_bias := setting(module.cfg, "halt_bias")):
            nn.init.constant_(module.act.halt.bias, halt_bias)
    return model


def _drawn(name: str, module: Any, seed: int, device: torch.device) -> dict[str, Tensor]:
    """The parameters of a module by itself, by name, whole."""
    drawn: dict[str, Tensor] = {}
    if isinstance(module, (nn.Linear, nn.Embedding)):
        drawn["weight"] = torch.empty(module.weight.shape, device=device)
        if getattr(module, "bias", None) is None:
            with _generator_of(f"{seed}/{name}", device):
                nn.init.normal_(drawn["weight"], std=INITIAL_STD)
            return drawn
    make = next((make for kind, make in _MADE_AGAIN.items() if isinstance(module, kind)), None)
    if make is None:
        raise ValueError(f"model: {name} is a {type(module).__name__}, whose initial weights are not known")
    with _generator_of(f"{seed}/{name}", device), device:
        again = dict(make(module).named_parameters(recurse=False))
        if drawn:
            nn.init.normal_(drawn["weight"], std=INITIAL_STD)
    return {**again, **drawn}


# Small modules, made again for their initial weights. A linear map with a bias is a halting layer.
_MADE_AGAIN: dict[type, Callable[[Any], nn.Module]] = {
    nn.Linear: lambda m: nn.Linear(m.in_features, m.out_features),
    RMSNorm: lambda m: RMSNorm(m.weight.shape[0]),
    LoRAAdapter: lambda m: LoRAAdapter(m.B.shape[1], m.B.shape[0], 1),
    Injection: lambda m: next(cls for cls in type(m).__mro__ if cls.__module__ == Injection.__module__)(m.B.shape[0]),
}


class _generator_of:
    """A context in which the device's generator has a state that follows from a text; the state before comes back."""

    def __init__(self, text: str, device: torch.device):
        self.device = device
        self.value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def __enter__(self) -> None:
        cuda = [self.device] if self.device.type == "cuda" else []
        self._fork = torch.random.fork_rng(cuda, device_type="cuda")
        self._fork.__enter__()
        torch.default_generator.manual_seed(self.value)
        for one in cuda:
            torch.cuda.default_generators[one.index].manual_seed(self.value)

    def __exit__(self, *error) -> None:
        self._fork.__exit__(*error)


def _keep(p: Tensor, whole: Tensor) -> None:
    """Copies a parameter's values, or this rank's shard of them."""
    if isinstance(p, DTensor):
        # Every rank has drawn the same: nothing is sent.
        mine = distribute_tensor(whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None)
        p.to_local().copy_(mine.to_local())
    else:
        p.copy_(whole)
