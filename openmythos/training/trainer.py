"""A minimal trainer: AdamW, gradient clipping, expert balancing, one record per step.

It uses a model's forward pass and parameters alone, so reference, accelerated and dense models train alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.injection import Injection
from openmythos.layers import at_least_fp32
from openmythos.moe import update_router_bias
from openmythos.training.schedule import learning_rate


class Step(NamedTuple):
    """The record of one training step."""

    step: int  # steps done, this one included
    loss: float  # mean cross-entropy in nats per token, before the update
    grad_norm: float  # before clipping
    lr: float
    tokens_per_second: float


def make_optimizer(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW with weight decay on weight matrices alone.

    No decay applies to 1-D parameters (norms, biases), embeddings (and a head tied to one), and an injection's own
    parameters: its decay rates, step sizes and gains (A, dt, B, Parcae's C) must not be pulled to zero. `train` sets
    the learning rate.
    """
    exempt = {
        id(p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p.dim() < 2 or isinstance(module, (nn.Embedding, Injection))
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def train(
    model: nn.Module,
    data,
    steps: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    lr: float = 3e-3,
    warmup: int = 10,
    floor: float = 0.1,
    clip: float = 1.0,
    router_rate: float = 1e-3,
    n_loops: int | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> Iterator[Step]:
    """Trains in place: each record taken from the returned iterator runs one step.

    A step depends on model, optimizer state, seed and step number alone, and leaves the global random state unchanged.
    So a run can stop after any record, be saved, and resume with the same arguments and `start` = steps done: it
    continues bit for bit as if it had never stopped.

    Args:
        model: maps (B, T) token ids to logits (B, T, vocabulary); left in training mode.
        data: anything for which `data[step]` is (inputs, targets), e.g. `Batches`, on the model's device.
        steps: length of the whole run, over which the schedule extends.
        optimizer: None means `make_optimizer(model)`; give one to save it or to resume.
        start: steps already done.
        lr, warmup, floor: see `learning_rate`.
        clip: largest norm of the gradient.
        router_rate: rate of `update_router_bias`.
        n_loops: loops of the recurrent block, for models that have one; None means the configured number.
        bf16: run the forward pass under bfloat16 autocast; parameters and optimizer keep their dtype.
        seed: for dropout and random initial states.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    for name, value in (("steps", steps), ("start", start), ("warmup", warmup), ("seed", seed)):
        checked_integer(name, value, 0)
    if start > steps:
        raise ValueError(f"start = {start}: must be <= steps = {steps}, the length of the whole run")
    for name, number in (("lr", lr), ("floor", floor), ("clip", clip), ("router_rate", router_rate)):
        if not number >= 0:
            raise ValueError(f"{name} = {number!r}: must be >= 0")
    optimizer = make_optimizer(model) if optimizer is None else optimizer

    def run() -> Iterator[Step]:  # a generator of its own, so that the checks above run at the call
        for step in range(start, steps):
            began = time.perf_counter()
            rate = learning_rate(step, steps, lr, warmup, floor)
            inputs, targets = data[step]
            with _random_state(inputs.device, seed, step):
                model.train()
                loss = _loss(model, inputs, targets, n_loops, bf16)
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                update_router_bias(model, router_rate)
            numbers = loss.item(), norm.item()  # waits for the device; the clock is read afterward
            yield Step(step + 1, *numbers, rate, inputs.numel() / (time.perf_counter() - began))

    return run()


@torch.no_grad()
def evaluate(model: nn.Module, data, batches: int = 8, *, n_loops: int | None = None, bf16: bool = False) -> float:
    """Mean loss in nats per token over `data[0]` .. `data[batches - 1]`, the same text at every call.

    The model is in eval mode meanwhile. Each module's training flag and the global random state are restored.

    Raises:
        ValueError: batches below 1.
    """
    checked_integer("batches", batches, 1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        losses = []
        for step in range(batches):
            inputs, targets = data[step]
            with _random_state(inputs.device, 0, step):
                losses.append(_loss(model, inputs, targets, n_loops, bf16).item())
        return sum(losses) / batches
    finally:
        for module, mode in modes:
            module.training = mode


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, n_loops: int | None, bf16: bool) -> Tensor:
    depth = {} if n_loops is None else {"n_loops": n_loops}
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(inputs, **depth)
    return F.cross_entropy(at_least_fp32(logits).flatten(0, 1), targets.flatten())


@contextmanager
def _random_state(device: torch.device, seed: int, step: int):
    """Seeds the generators by seed and step alone, and restores their states afterward."""
    value = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu, device_type="cuda"):
        # Not torch.manual_seed: it would also seed the generators of other GPUs, which are not restored.
        torch.default_generator.manual_seed(value)
        for one in gpu:
            torch.cuda.default_generators[one.index].manual_seed(value)
        yield
