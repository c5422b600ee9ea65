"""`python -m benchmarks.expert_weights`: what it costs the host to keep experts' weights as lists of matrices.

docs/moe.md rests a decision on these numbers. Medians of 200 calls, in CPU time; no kernel runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

import openmythos
from openmythos_kernels.nn.paths.moe_experts import expert_weights
from openmythos_kernels.ops.moe.launch.weights import matrices

DIM, INNER = 64, 32  # small, since the host's work does not depend on them


def microseconds(call: Callable[[], object]) -> float:
    samples = []
    for _ in range(200):
        begin = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - begin))
    return median(samples)


def adamw(parameters: list[nn.Parameter]) -> float:
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    return microseconds(optimizer.step)


def main() -> None:
    print("experts  collect the lists  look the table up  fused AdamW, lists  fused AdamW, stacked   (us)")
    for count in (64, 512):
        cfg = SimpleNamespace(dim=DIM, expert_dim=INNER, n_experts=count, n_experts_per_tok=4, n_shared_experts=0)
        experts = openmythos.MoEFFN(cfg).routed_experts
        lists = expert_weights(experts)
        times = (
            microseconds(lambda experts=experts: expert_weights(experts)),
            microseconds(lambda lists=lists: [matrices(part) for part in lists]),
            adamw(list(experts.parameters())),
            adamw([nn.Parameter(torch.stack(part).detach()) for part in lists]),
        )
        print(f"{count:7}  {times[0]:17.0f}  {times[1]:17.0f}  {times[2]:18.0f}  {times[3]:20.0f}")


if __name__ == "__main__":
    main()
