"""Training steps: forward, backward, clipping, optimizer, expert balancing, one record per step.

They use a model's forward pass and parameters alone, so reference, accelerated and dense models train alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from openmythos.config import checked_integer
from openmythos.exits import Exit
from openmythos.moe import update_router_bias
from openmythos.training.depth import DepthConfig, draw_depths
from openmythos.training.losses import LossConfig, losses
from openmythos.training.optimizers import OptimizerConfig, make_optimizer


class Step(NamedTuple):
    """The record of one training step. The loss is that before the update, the norm that before clipping."""

    step: int  # steps done, this one included
    loss: float  # mean cross-entropy in nats per token
    grad_norm: float
    lr: float  # of the first group of the optimizer
    tokens_per_second: float
    depth: float = 0.0  # mean number of loops; 0 for a model without
    skipped: bool = False  # the loss or the norm was not finite: nothing was updated
    parts: dict[str, float] = {}  # what else the loss is made of


class Trainer:
    """Runs the steps of a training run, each a function of model, optimizer state, seed and step number alone.

    Args:
        model: maps (B, T) token ids to logits (B, T, vocabulary), as an OpenMythos or a DenseTransformer does.
        data: `data[step]` is (inputs, targets), (B, T) int64 each: this rank's rows.
        steps: length of the whole run, over which the schedule extends.
        optimizer: None means `make_optimizer(model, config=optimization)`.
        depth: loops of a step; None: those that the model has configured.
        loss, optimization: what is minimized, and how weights follow.
        options: further arguments of the model's forward, e.g. checkpoint_loops.
        autocast: run the forward pass under bfloat16 autocast; parameters and optimizer keep their dtype.
        accumulate: parts in which a step's rows are computed, one after the other.
        seed: for depths, dropout and random initial states.
        rank, ranks: of this process; ranks hold equally many rows of a step.
        clip: (model, largest norm) -> norm before clipping.
        part: a context for each part but the last, e.g. DDP's no_sync.
        mean: averages a float64 tensor over ranks, in place.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        steps: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        depth: DepthConfig | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        optimization: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        options: dict[str, Any] | None = None,
        autocast: bool = False,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        clip: Callable[[nn.Module, float], Tensor] | None = None,
        part: Callable[[], AbstractContextManager] = nullcontext,
        mean: Callable[[Tensor], Any] | None = None,
    ):
        self.model, self.data, self.steps = model, data, checked_integer("steps", steps, 0)
        self.optimizer = make_optimizer(model, config=optimization) if optimizer is None else optimizer
        self.depth, self.loss, self.optimization = depth, loss, optimization
        self._options, self._autocast = options or {}, autocast
        self._accumulate, self._seed = checked_integer("accumulate", accumulate, 1), checked_integer("seed", seed, 0)
        self._rank, self._ranks = rank, ranks
        self._clip = clip or (lambda model, largest: nn.utils.clip_grad_norm_(model.parameters(), largest))
        self._part, self._mean = part, mean

    def step(self, step: int) -> Step:
        """Runs step `step`, counted from 0. The model is left in training mode, the global random state as it was."""
        began = time.perf_counter()
        inputs, targets = self.data[step]
        rows, model = len(inputs), self.model
        if rows % self._accumulate:
            raise ValueError(f"data: {rows} rows in a step, must be a multiple of accumulate = {self._accumulate}")
        depths = self._depths(step, rows)
        model.train()
        self.optimizer.zero_grad()
        # One state for all of the step: dropout, random initial states, stochastic rounding.
        with random_state(inputs.device, self._seed, step, self._rank):
            sums = self._gradients(step, inputs, targets, depths)
            norm = self._clip(model, self.optimization.clip)
            values = torch.stack(list(sums.values()))
            if self._mean is not None:
                self._mean(values)
            numbers = dict(zip(sums, values.tolist()))  # waits for the device; the clock is read afterward
            loss, grad_norm = numbers.pop("loss"), float(norm)
            skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
            share = self.optimization.share(step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = share * group.get("peak", self.optimization.lr)
            if not skipped:
                self.optimizer.step()
        update_router_bias(model, 0.0 if skipped else self.loss.router_rate)
        tokens = inputs.numel() * self._ranks / (time.perf_counter() - began)
        mean_depth = sum(depths) / len(depths) if self.depth is not None else 0.0
        rate = self.optimizer.param_groups[0]["lr"]
        return Step(step + 1, loss, grad_norm, rate, tokens, mean_depth, skipped, numbers)

    def _gradients(self, step: int, inputs: Tensor, targets: Tensor, depths: list[int]) -> dict[str, Tensor]:
        """Forward and backward of a step, part by part. Returns what the loss is made of, float64 scalars."""
        size = len(inputs) // self._accumulate
        sums: dict[str, Tensor] = {}
        for begin in range(0, len(inputs), size):
            mine, last = slice(begin, begin + size), begin + size == len(inputs)
            with nullcontext() if last else self._part():
                with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._autocast):
                    how = self._loops(depths[mine])
                    loss, parts = losses(self.model, inputs[mine], targets[mine], self.loss, step, **how)
                (loss / self._accumulate).backward()
            for name, value in parts.items():
                share = value.double() / self._accumulate
                sums[name] = sums[name] + share if name in sums else share
        return sums

    def _depths(self, step: int, rows: int) -> list[int]:
        """The loops of this rank's rows."""
        if self.depth is None:
            return [0] * rows
        drawn = draw_depths(self.depth, step, rows * self._ranks, self._seed)
        return drawn[self._rank * rows : (self._rank + 1) * rows]

    def _loops(self, depths: list[int]) -> dict[str, Any]:
        """The model's arguments for these numbers of loops."""
        if self.depth is None:
            return self._options
        n_loops = depths[0] if min(depths) == max(depths) else depths
        graded = self.depth.gradient_loops
        return {"n_loops": n_loops, **({} if graded is None else {"grad_loops": graded}), **self._options}


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
    for group in optimizer.param_groups:
        group["peak"] = lr
    trainer = Trainer(
        model,
        data,
        steps,
        optimizer=optimizer,
        loss=LossConfig(chunk=0, router_rate=router_rate),
        optimization=OptimizerConfig(lr=lr, warmup=warmup, floor=floor, clip=clip),
        options={} if n_loops is None else {"n_loops": n_loops},
        autocast=bf16,
        seed=seed,
    )
    return (trainer.step(step) for step in range(start, steps))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data,
    batches: int = 8,
    *,
    n_loops: int | None = None,
    bf16: bool = False,
    chunk: int = 0,
    mean: Callable[[Tensor], Any] | None = None,
    exit: Exit = None,
) -> float:
    """Mean loss in nats per token over `data[0]` .. `data[batches - 1]`, the same text at every call.

    The model is in eval mode meanwhile. Each module's training flag and the global random state are restored.

    Args:
        chunk: tokens whose logits are in memory at a time; 0: a batch's.
        mean: averages a float64 tensor over ranks, in place.
        exit: as for the model.

    Raises:
        ValueError: batches below 1.
    """
    checked_integer("batches", batches, 1)
    depth: dict[str, Any] = {} if n_loops is None else {"n_loops": n_loops}
    depth |= {} if exit is None else {"exit": exit}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = []
        for step in range(batches):
            inputs, targets = data[step]
            with random_state(inputs.device, 0, step), torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
                found.append(losses(model, inputs, targets, LossConfig(chunk=chunk), **depth)[1]["loss"].double())
        total = torch.stack(found).mean()
        if mean is not None:
            mean(total)
        return total.item()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def random_state(device: torch.device, seed: int, step: int, rank: int = 0):
    """Seeds the generators by its arguments alone, and restores their states afterward."""
    entropy = (seed, step, rank) if rank else (seed, step)
    value = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu, device_type="cuda"):
        # Not torch.manual_seed: it would also seed the generators of other GPUs, which are not restored.
        torch.default_generator.manual_seed(value)
        for one in gpu:
            torch.cuda.default_generators[one.index].manual_seed(value)
        yield
