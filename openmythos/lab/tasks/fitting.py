"""A training loop for tasks whose loss or number of loops depends on the step's data, which `Trainer` does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn as nn
from torch import Tensor

from openmythos.training.optimizers import OptimizerConfig, make_optimizer


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, optimizer: OptimizerConfig) -> Iterator[int]:
    """Trains in place; each number taken from the iterator is that of the steps done. Stop taking to stop early.

    Args:
        loss: step -> scalar, a function of the step and the model alone.
    """
    made = make_optimizer(model, config=optimizer)
    for step in range(steps):
        model.train()
        made.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip)
        for group in made.param_groups:
            group["lr"] = optimizer.share(step, steps) * group["peak"]
        made.step()
        yield step + 1
