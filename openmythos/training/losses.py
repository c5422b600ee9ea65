"""What a training step minimizes: cross-entropy without whole logits, z-loss, ponder cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.config import checked_integer, setting
from openmythos.layers import at_least_fp32


@dataclass(frozen=True)
class LossConfig:
    """What a training step minimizes: cross-entropy and the terms below.

    Attributes:
        chunk: tokens whose logits are in memory at a time; 0: all.
        z_weight: weight of the z-loss, the mean of the squared logsumexp of the logits (PaLM, arXiv 2204.02311).
        ponder_weight: weight of the mean ponder cost of positions (Graves, arXiv 1603.08983); needs ACT.
        ponder_warmup: steps over which that weight grows linearly from 0.
        router_rate: rate at which router biases move toward balanced experts; 0: they stay.
    """

    chunk: int = 2048
    z_weight: float = 0.0
    ponder_weight: float = 0.0
    ponder_warmup: int = 0
    router_rate: float = 1e-3

    def __post_init__(self) -> None:
        checked_integer("loss.chunk", self.chunk, 0)
        checked_integer("loss.ponder_warmup", self.ponder_warmup, 0)
        for name in ("z_weight", "ponder_weight", "router_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} = {getattr(self, name)}: must be >= 0")

    def check_model(self, cfg: Any) -> None:
        """
        Raises:
            ValueError: the ponder cost needs ACT, and a model of `cfg` has none.
        """
        if self.ponder_weight and (hasattr(cfg, "n_layers") or setting(cfg, "halting") == "off"):
            raise ValueError(f"loss.ponder_weight = {self.ponder_weight}: must be 0 for a model without ACT")


def losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: LossConfig, step: int = 0, **depth
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, to call `backward` on, and its parts.

    Args:
        model: an OpenMythos, a DenseTransformer, or what wraps one and passes arguments on; with
            `loss.chunk` = 0 and no ponder cost anything that maps ids to logits.
        inputs, targets: (B, T) int64.
        step: counted from 0, for the warm-up of the ponder cost.
        depth: n_loops, grad_loops, checkpoint_loops, checkpoint_layers of the model.

    Returns:
        The loss, and without gradients its parts: "loss", the mean cross-entropy in nats per token, and where their
        weights are not 0 "z" and "ponder", each before its weight.
    """
    asked = {"return_hidden": loss.chunk > 0, "return_ponder": loss.ponder_weight > 0}
    out = model(inputs, **depth, **{name: True for name, wanted in asked.items() if wanted})
    out, ponder = out if loss.ponder_weight else (out, None)
    head = head_of(model) if loss.chunk else nn.Identity()
    entropy, z = token_losses(out, head, targets, loss.chunk, with_z=loss.z_weight > 0)
    total, parts = entropy, {"loss": entropy.detach()}
    if loss.z_weight:
        total, parts["z"] = total + loss.z_weight * z, z.detach()
    if ponder is not None:
        weight = loss.ponder_weight * min(1.0, (step + 1) / (loss.ponder_warmup + 1))
        total, parts["ponder"] = total + weight * ponder.mean(), ponder.detach().mean()
    return total, parts


def token_losses(
    hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = 0, with_z: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats and mean squared logsumexp of logits `head(hidden)`, chunk by chunk.

    With gradients, a chunk's logits are computed again in the backward pass. So logits of `chunk` tokens are in memory
    at a time, where all would take B * T * vocab_size numbers, several times over.

    Args:
        hidden: (B, T, dim). targets: (B, T) int64. chunk: tokens; 0: all at once.
        with_z: compute the second result; else it is 0.

    Returns:
        Two scalars, float32 (float64 for float64 hidden).
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    size = chunk or len(flat)
    sums = [at_least_fp32(flat.new_zeros(())) for _ in range(2)]
    for rows, tokens in zip(flat.split(size), wanted.split(size)):
        if size < len(flat) and torch.is_grad_enabled():
            found = checkpoint(_sums, rows, head, tokens, with_z, use_reentrant=False)
        else:
            found = _sums(rows, head, tokens, with_z)
        sums = [a + b for a, b in zip(sums, found)]
    return sums[0] / len(flat), sums[1] / len(flat)


def _sums(rows: Tensor, head: nn.Module, targets: Tensor, with_z: bool) -> tuple[Tensor, Tensor]:
    logits = at_least_fp32(head(rows))
    entropy = F.cross_entropy(logits, targets, reduction="sum")
    return entropy, logits.logsumexp(-1).square().sum() if with_z else torch.zeros_like(entropy)


def head_of(model: nn.Module) -> nn.Module:
    """The head of a language model, or of the one that DDP and the like wrap."""
    while not hasattr(model, "head") and hasattr(model, "module"):
        model = model.get_submodule("module")
    return model.get_submodule("head")
