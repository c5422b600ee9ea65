"""What the ranks of the tests here do: a tiny training loop, which stands in for a trainer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from openmythos import OpenMythos, update_router_bias
from openmythos.parallel import Plan, clip_grad_norm_, parallelize, unwrap
from tests.kit.tiny import tiny_config, tokens

# Some position of every sequence runs all loops: router loads are counted in the loops that run, and in which loop the
# last position of a batch halts depends on the batch.
FIELDS = dict(n_experts=8, n_experts_per_tok=2, act_threshold=0.99, halt_bias=-2.0)
BATCH = 4  # sequences a step, of all ranks together


def make(seed: int = 3, plan: Plan | None = None, mixed: torch.dtype | None = None, **fields) -> nn.Module:
    """A model from the meta device, with weights that matter."""
    with torch.device("meta"):
        model = OpenMythos(tiny_config(**{**FIELDS, **fields}))
    model = parallelize(model, plan, seed=seed, mixed=mixed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(5)
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # In its first steps Adam with a small eps moves a parameter by the sign of its gradient, be it a rounding error.
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, eps=1e-5)


def my_part(rows):
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]


def loss_of(model: nn.Module, step: int, loops=None, **options) -> torch.Tensor:
    ids = my_part(tokens(BATCH, 10, seed=100 + step))
    loops = my_part(loops) if isinstance(loops, list) else loops
    logits = model(ids[:, :-1], n_loops=loops, **options)
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def mean_over_ranks(x: torch.Tensor) -> float:
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return float(x)


def train(model: nn.Module, optimizer, steps, loops=None, rate: float = 0.01, **options) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step. `loops` may be a function of the step."""
    record = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step, loops(step) if callable(loops) else loops, **options)
        loss.backward()
        norm = clip_grad_norm_(model, 0.7)
        optimizer.step()
        update_router_bias(unwrap(model), rate)
        record.append((mean_over_ranks(loss), float(norm)))
    return record
