"""PonderNet's objective (Banino et al., arXiv 2107.05407): the loop a position halts in is random, with a prior.

The halting probability of a loop is conditional on not having halted before. So a position halts in loop t with
probability `p_t = lambda_t (1 - lambda_0) .. (1 - lambda_(t-1))`, and in its last loop with all that is left. What is
minimized is the cross-entropy expected over that distribution, and its divergence from a geometric one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halting_distribution(halting: Tensor, loops: Tensor) -> Tensor:
    """The probability that a position halts in a loop.

    Args:
        halting: (n, B, T), given that it has not halted before; what stands behind a sequence's last loop is not read.
        loops: (B,) int64, those of each sequence, at most n.

    Returns:
        (n, B, T), which sums to 1 over the loops and is 0 behind a sequence's last.
    """
    left, found = torch.ones_like(halting[0]), []
    for t, p in enumerate(halting):
        here, last = (loops > t).unsqueeze(-1), (loops == t + 1).unsqueeze(-1)
        p = torch.where(last, 1.0, torch.where(here, p, 0.0))
        found.append(left * p)
        left = left * (1 - p)
    return torch.stack(found)


def geometric_prior(mean: float, n: int, loops: Tensor) -> Tensor:
    """Log of the geometric distribution with this mean, given that it halts in one of a sequence's loops.

    Args:
        mean: in loops, > 1: the mean before it is truncated.
        n: loops of the result.
        loops: (B,) int64, at most n.

    Returns:
        (n, B) float64, 0 behind a sequence's last loop.
    """
    t = torch.arange(n, device=loops.device).unsqueeze(-1)
    log = t.double() * torch.log1p(torch.tensor(-1 / mean, dtype=torch.float64, device=loops.device))
    log = log.expand(n, len(loops)).masked_fill(t >= loops, float("-inf")).log_softmax(0)
    return log.masked_fill(t >= loops, 0.0)


def prior_divergence(p: Tensor, mean: float, loops: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of p from the prior, the mean over all positions.

    Args:
        p: (n, B, T), as from `halting_distribution`. mean, loops: as for `geometric_prior`.
    """
    prior = geometric_prior(mean, len(p), loops).to(p.dtype).unsqueeze(-1)
    log = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # p log p is 0 where p is, with a finite gradient
    return (p * (log - prior)).sum(0).mean()
