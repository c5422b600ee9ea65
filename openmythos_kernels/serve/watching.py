"""What `openmythos_kernels.depth.depth_stats` sees of tokens that are served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openmythos.exits import ExitRule
from openmythos_kernels.serve.deciding import mode
from openmythos_kernels.serve.weights import Weights


def watch(weights: Weights, rule: ExitRule | None, loops: Sequence[int], ponder: Tensor) -> None:
    """Calls the recurrent block's watchers for tokens that leave the loop, as a forward with these tokens would.

    Args:
        rule: the exit of their request.
        loops: how many loops were computed of each token.
        ponder: (n,), ACT's ponder cost of each. Without freezing it says in which loop a token halted.
    """
    act, freezes = mode(rule, weights.halting)
    if not weights.recurrent.watchers or not (act or freezes):
        return
    depths = loops if freezes else (ponder.ceil() - 1).long().tolist()  # N + R with 0 < R <= 1
    for t in range(max(loops)):
        running = [depth > t for ran, depth in zip(loops, depths) if ran > t]
        weights.recurrent.watch(torch.tensor([running], device=weights.device), t)
