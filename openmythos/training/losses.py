"""What a training step minimizes: cross-entropy without whole logits, and what is added to it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmythos.balance import recording_scores
from openmythos.config import checked_integer, setting
from openmythos.layers import at_least_fp32
from openmythos.training.head_loss import head_sums, is_plain
from openmythos.training.prior import halting_distribution, prior_divergence
from openmythos.trajectory import Trajectory


@dataclass(frozen=True)
class LossConfig:
    """What a training step minimizes: cross-entropy and the terms below.

    Attributes:
        chunk: tokens whose logits are in memory at a time; 0: all.
        z_weight: weight of the z-loss, the mean of the squared logsumexp of the logits (PaLM, arXiv 2204.02311).
        ponder_weight: weight of the mean ponder cost of positions (Graves, arXiv 1603.08983); needs ACT.
        ponder_warmup: steps over which that weight grows linearly from 0.
        prior_weight: weight of the divergence of the halting distribution from a geometric one (PonderNet, arXiv
            2107.05407). Cross-entropy and z-loss are then expected values over the loop that a position halts in.
        prior_mean: mean of that geometric distribution, in loops.
        balance_weight: weight of the balance loss of experts within a sequence (`openmythos.balance`); 0: none.
        router_rate: rate at which router biases move toward balanced experts; 0: they stay.
    """

    chunk: int = 2048
    z_weight: float = 0.0
    ponder_weight: float = 0.0
    ponder_warmup: int = 0
    prior_weight: float = 0.0
    prior_mean: float = 5.0
    balance_weight: float = 0.0
    router_rate: float = 1e-3

    def __post_init__(self) -> None:
        checked_integer("loss.chunk", self.chunk, 0)
        checked_integer("loss.ponder_warmup", self.ponder_warmup, 0)
        for name in ("z_weight", "ponder_weight", "prior_weight", "balance_weight", "router_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} = {getattr(self, name)}: must be >= 0")
        if not 1 < self.prior_mean < math.inf:
            raise ValueError(f"loss.prior_mean = {self.prior_mean}: must be > 1 and finite")
        if self.prior_weight and self.ponder_weight:
            raise ValueError(
                f"loss.ponder_weight = {self.ponder_weight}: must be 0 with loss.prior_weight, without ACT"
            )

    @property
    def predicts_each(self) -> bool:
        """Whether coda and head predict from the state of every loop."""
        return self.prior_weight > 0

    def check_model(self, cfg: Any) -> None:
        """
        Raises:
            ValueError: a term does not fit a model of `cfg`.
        """
        if self.ponder_weight and (hasattr(cfg, "n_layers") or setting(cfg, "halting") == "off"):
            raise ValueError(f"loss.ponder_weight = {self.ponder_weight}: must be 0 for a model without ACT")
        if self.prior_weight and hasattr(cfg, "n_layers"):
            raise ValueError(f"loss.prior_weight = {self.prior_weight}: must be 0 for a dense model")
        if self.prior_weight and (halting := setting(cfg, "halting")) != "off":
            raise ValueError(
                f'model.halting = "{halting}": must be "off" with loss.prior_weight: ACT adds up probabilities that '
                "are conditional in PonderNet"
            )
        if self.balance_weight and (hasattr(cfg, "n_layers") or setting(cfg, "core_ffn") != "moe"):
            raise ValueError(f"loss.balance_weight = {self.balance_weight}: must be 0 for a model without experts")


def losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: LossConfig, step: int = 0, **depth
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, to call `backward` on, and its parts.

    Args:
        model: an OpenMythos, a DenseTransformer, or what wraps one and passes arguments on; with `loss.chunk` = 0 and
            the cross-entropy alone anything that maps ids to logits.
        inputs, targets: (B, T) int64.
        step: counted from 0, for the warm-up of the ponder cost.
        depth: n_loops, grad_loops, checkpoint_loops, checkpoint_layers of the model.

    Returns:
        The loss, and without gradients its parts: "loss", the mean cross-entropy in nats per token, and where their
        weights are not 0 "z", "ponder", "prior" and "balance", each before its weight; with "prior" also
        "expected_depth", the mean of the halting distribution in loops.
    """
    with recording_scores(model, len(inputs)) if loss.balance_weight else nullcontext() as scores:
        if loss.prior_weight:
            total, parts = _prior_losses(model, inputs, targets, loss, **depth)
        else:
            total, parts = _plain_losses(model, inputs, targets, loss, step, **depth)
    if scores is not None:
        balance = scores.balance()
        total, parts["balance"] = total + loss.balance_weight * balance, balance.detach()
    return total, parts


def _plain_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: LossConfig, step: int, **depth
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses` of what the model returns."""
    asked = {"return_hidden": loss.chunk > 0, "return_ponder": loss.ponder_weight > 0}
    out = model(inputs, **depth, **{name: True for name, wanted in asked.items() if wanted})
    out, ponder = out if loss.ponder_weight else (out, None)
    head = head_of(model) if loss.chunk else nn.Identity()
    total, entropy, z = token_losses(out, head, targets, loss.chunk, loss.z_weight)
    parts = {"loss": entropy}
    if loss.z_weight:
        parts["z"] = z
    if ponder is not None:
        weight = loss.ponder_weight * min(1.0, (step + 1) / (loss.ponder_warmup + 1))
        total, parts["ponder"] = total + weight * ponder.mean(), ponder.detach().mean()
    return total, parts


def _prior_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: LossConfig, **depth
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses` with a prior on halting."""
    seen: Trajectory = model(inputs, **depth, return_hidden=loss.chunk > 0, return_trajectory=True)
    halting, loops = seen.by_loop(seen.halting), seen.sequence.bincount()
    p = halting_distribution(halting, loops)
    head = head_of(model) if loss.chunk else nn.Identity()
    weight = p[seen.loop, seen.sequence] / targets.numel()
    total, entropy, z = token_losses(seen.output, head, targets[seen.sequence], loss.chunk, loss.z_weight, weight)
    prior = prior_divergence(p, loss.prior_mean, loops)
    total = total + loss.prior_weight * prior
    number = torch.arange(1, len(p) + 1, device=p.device).view(-1, 1, 1)
    depths = (p.detach() * number).sum(0).mean()
    parts = {"loss": entropy, "prior": prior.detach(), "expected_depth": depths}
    if loss.z_weight:
        parts["z"] = z
    return total, parts


def token_losses(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    chunk: int = 0,
    z_weight: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats and mean squared logsumexp of logits `head(hidden)`, chunk by chunk.

    Logits of `chunk` tokens are in memory at a time, where all would take B * T * vocab_size numbers, several times
    over. A head that is a plain `nn.Linear` without bias gives its gradients in the forward pass (`head_loss`); any
    other computes a chunk's logits again in the backward pass.

    Args:
        hidden: (B, T, dim). targets: (B, T) int64. chunk: tokens; 0: all at once.
        z_weight: of the squared logsumexp in the loss; 0: it is not computed.
        weight: (B, T), of each token; the results are then sums.

    Returns:
        The loss, to call `backward` on, and without gradients its two parts: scalars, float32 (float64 for float64
        hidden). Chunks of a plain head have no second derivatives: `create_graph` raises RuntimeError.
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    factors = None if weight is None else weight.flatten()
    size = chunk or len(flat)
    if chunk and is_plain(head):
        total, entropy, z = head_sums(flat, head.weight, wanted, size, z_weight, factors)
    else:
        entropy, z = _called_sums(flat, head, wanted, size, z_weight > 0, factors)
        total = entropy + z_weight * z
    count = len(flat) if weight is None else 1
    return total / count, entropy.detach() / count, z.detach() / count


def _called_sums(
    flat: Tensor, head: nn.Module, targets: Tensor, size: int, with_z: bool, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sums with any head, of `size` rows at a time."""
    sums = [at_least_fp32(flat.new_zeros(())) for _ in range(2)]
    split = [None] * len(flat) if factors is None else factors.split(size)
    for rows, tokens, factor in zip(flat.split(size), targets.split(size), split):
        if size < len(flat) and torch.is_grad_enabled():
            found = checkpoint(_sums, rows, head, tokens, with_z, factor, use_reentrant=False)
        else:
            found = _sums(rows, head, tokens, with_z, factor)
        sums = [a + b for a, b in zip(sums, found)]
    return sums[0], sums[1]


def _sums(rows: Tensor, head: nn.Module, targets: Tensor, with_z: bool, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = at_least_fp32(head(rows))
    if factor is None:
        entropy = F.cross_entropy(logits, targets, reduction="sum")
        return entropy, logits.logsumexp(-1).square().sum() if with_z else torch.zeros_like(entropy)
    entropy = (factor * F.cross_entropy(logits, targets, reduction="none")).sum()
    return entropy, (factor * logits.logsumexp(-1).square()).sum() if with_z else torch.zeros_like(entropy)


def head_of(model: nn.Module) -> nn.Module:
    """The head of a language model, or of the one that DDP and the like wrap."""
    while not hasattr(model, "head") and hasattr(model, "module"):
        model = model.get_submodule("module")
    return model.get_submodule("head")
