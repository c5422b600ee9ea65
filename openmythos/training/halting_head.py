"""A halting head fitted on the states of a trained model, whose other weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.dropout import without_dropout
from openmythos.layers import at_least_fp32
from openmythos.recurrence import resolve_loops


class HaltingFit(NamedTuple):
    """What `fit_halting` found.

    Attributes:
        before, after: binary cross-entropy of the head in nats, the mean over states, before and after the fit.
        settled: share of the states from which on the prediction stayed that of the last loop.
        states: how many there were.
    """

    before: float
    after: float
    settled: float
    states: int


@torch.no_grad()
def settled_states(
    model: Any, data: Iterable[tuple[Tensor, Tensor]], n_loops: int | None = None, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    """States of all loops but the last, and whether their predictions are final.

    Args:
        model: an OpenMythos.
        data: batches (ids, targets), (B, T) int64 each; targets are not read.
        n_loops: loops of a run, the same for all sequences; None means those configured.
        chunk: tokens whose logits are in memory at a time; 0: a batch's.

    Returns:
        states (S, dim), and settled (S,) bool: from that loop on the likeliest token is the one of the last loop.

    Raises:
        ValueError: there are fewer than two loops, or there is no batch.
    """
    loops = resolve_loops(n_loops, model.cfg)
    if loops < 2:
        raise ValueError(f"n_loops = {loops}: must be >= 2, as the last loop leaves nothing to decide")
    states, settled = [], []
    with without_dropout(model):
        for ids, _ in data:
            seen = model(ids, n_loops=loops, return_trajectory=True, return_hidden=True)
            rows = seen.output.flatten(0, 1)
            tokens = torch.cat([model.head(part).argmax(-1) for part in rows.split(chunk or len(rows))])
            tokens = tokens.view(loops, -1)
            same = (tokens == tokens[-1]).int().flip(0).cummin(0).values.flip(0).bool()
            states.append(seen.states.unflatten(0, (loops, -1))[:-1].flatten(0, 2))
            settled.append(same[:-1].flatten())
    if not states:
        raise ValueError("data: got no batch, must have at least one")
    return torch.cat(states), torch.cat(settled)


def halting_error(model: Any, states: Tensor, settled: Tensor) -> float:
    """Binary cross-entropy in nats of the model's halting head on `settled_states`."""
    with torch.no_grad():
        p = model.recurrent.act(states.unsqueeze(0))[0]
        return F.binary_cross_entropy(p, settled.to(p.dtype)).item()


def fit_halting(
    model: Any,
    data: Iterable[tuple[Tensor, Tensor]],
    n_loops: int | None = None,
    penalty: float = 1e-3,
    iterations: int = 100,
    chunk: int = 2048,
) -> HaltingFit:
    """Fits ACT's linear layer to tell whether a position's prediction is final, by logistic regression.

    `exit="head"` reads it so, with any model. ACT reads it otherwise: with halting on, the model's own output changes.
    No other weight changes. Memory: all states at once, dim numbers for each token and loop.

    Args:
        model: an OpenMythos. data, n_loops, chunk: as for `settled_states`; some thousand tokens.
        penalty: of the squared norm of the weights for channels of unit variance; > 0 keeps them finite where the
            states can be told apart without an error.
        iterations: of L-BFGS at most.

    Raises:
        ValueError: as `settled_states`, or penalty is negative.
    """
    checked_integer("iterations", iterations, 1)
    if not penalty >= 0:
        raise ValueError(f"penalty = {penalty!r}: must be >= 0")
    states, settled = settled_states(model, data, n_loops, chunk)
    before = halting_error(model, states, settled)
    wide = at_least_fp32(states)
    mean, scale = wide.mean(0), wide.std(0).clamp_min(1e-6)
    normal, wanted = (wide - mean) / scale, settled.to(wide.dtype)
    weight = wide.new_zeros(wide.shape[-1], requires_grad=True)
    share = wanted.mean().clamp(1e-4, 1 - 1e-4)
    bias = share.logit().clone().requires_grad_()
    search = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            found = F.binary_cross_entropy_with_logits(normal @ weight + bias, wanted)
            found = found + penalty * weight.square().sum()
            found.backward()
        return found

    search.step(loss)
    halt = model.recurrent.act.halt
    with torch.no_grad():
        halt.weight.copy_((weight / scale).unsqueeze(0))
        halt.bias.copy_(bias - (weight / scale * mean).sum())
    return HaltingFit(before, halting_error(model, states, settled), share.item(), len(states))
