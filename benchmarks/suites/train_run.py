"""`openmythos train tiny`: speed and loss with the fast modules and without, and the memory that checkpoints save.

The losses are those of short runs, since a run of `tiny` takes minutes; three seeds of the reference show how far runs
lie apart anyway.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.apart import apart
from benchmarks.session import Requirement, Session, speed_requirement
from benchmarks.timing import Lap, interleave, speedup
from openmythos.commands.parsing import parse
from openmythos.commands.train import CONFIGS
from openmythos.training import PrepareConfig, TokenShards, prepare
from openmythos.training.config import TrainConfig
from openmythos.training.depth import DepthConfig
from openmythos.training.losses import LossConfig, losses
from openmythos.training.ranks import Ranks
from openmythos.training.run import build_model
from openmythos.training.trainer import Trainer, evaluate

LOOPS = 4
SEEDS = 3
STEPS = 60
MEMORY_TOKENS, MEMORY_LOOPS = 2048, 8


def run(session: Session) -> dict:
    rounds = (5, 15, 120.0) if not session.quick else (2, 3, 10.0)
    steps = 4 if session.quick else STEPS
    with tempfile.TemporaryDirectory() as folder:
        shards = str(Path(folder) / "shards")
        prepare(PrepareConfig(["stdlib"], shards, progress=False))
        config = parse(TrainConfig, ["tiny", f"data.folder={shards}"], "train_run", CONFIGS)
        with session.progress.stage("train_run: steps of tiny", rounds[1] * 2) as tick:
            samples = _steps(session, config, rounds, tick)
        with session.progress.stage(f"train_run: losses after {steps} steps", 2 * SEEDS) as tick:
            held_out = _losses(session, config, steps, tick)
    with session.progress.stage("train_run: peak memory", 4) as tick:
        kept = {}
        for fast in (False, True):
            for checkpointed in (False, True):
                kept[fast, checkpointed] = apart(_memory, session, fast, checkpointed)
                tick()
    spread = max(held_out["reference"]) - min(held_out["reference"])
    apart_by = max(abs(a - b) for a, b in zip(held_out["fast"], held_out["reference"]))
    rows = [
        speed_requirement(
            f"training tiny, {LOOPS} loops, tokens/s, fast modules",
            1.5,
            speedup(samples["reference"], samples["fast"]),
            "x the reference",
        ),
        Requirement(
            f"held-out loss after {steps} steps, fast from reference",
            spread,
            apart_by,
            "nats",
            False,
            higher=False,
            detail=f"required: the spread of {SEEDS} seeds of the reference",
        ),
        *[_memory_row(kept, fast) for fast in (False, True)],
    ]
    return {
        "losses": held_out,
        "seconds": samples,
        "memory": {
            f"{'fast' if f else 'reference'}, {'checkpoint_loops' if c else 'all'}": n for (f, c), n in kept.items()
        },
        "requirements": [row.as_dict() for row in rows],
    }


def _memory_row(kept: dict[tuple[bool, bool], int], fast: bool) -> Requirement:
    megabytes = " -> ".join(f"{kept[fast, checkpointed] / 2**20:.0f} MiB" for checkpointed in (False, True))
    return Requirement(
        f"peak memory of a step, {MEMORY_TOKENS} tokens, {MEMORY_LOOPS} loops, checkpoint_loops, "
        + ("fast modules" if fast else "reference"),
        0.35,
        kept[fast, True] / kept[fast, False],
        "x without",
        False,
        higher=False,
        detail=megabytes,
    )


def _trainer(session: Session, config: TrainConfig, fast: bool, steps: int) -> Trainer:
    config = replace(config, fast=fast)
    model = build_model(config, config.check(), Ranks(0, 1, session.device))
    text = TokenShards(config.data.folder, "train", config.batch, config.tokens, config.seed, device=session.device)
    return Trainer(
        model, text, steps, depth=config.depth, loss=config.loss, optimization=config.optimizer, seed=config.seed
    )


def _steps(session: Session, config: TrainConfig, rounds, tick) -> dict[str, list[float]]:
    """Seconds of steps that run `LOOPS` loops each."""
    config = replace(config, depth=DepthConfig(sampling="fixed", mean=LOOPS))
    trainers = {name: _trainer(session, config, name == "fast", 10**6) for name in ("reference", "fast")}
    done = dict.fromkeys(trainers, 0)

    def step(name: str) -> None:
        trainers[name].step(done[name])
        done[name] += 1

    laps = {name: Lap(lambda name=name: step(name)) for name in trainers}
    return interleave(laps, session.clock, *rounds, tick=tick)


def _losses(session: Session, config: TrainConfig, steps: int, tick) -> dict[str, list[float]]:
    """Held-out losses of whole runs, by seed."""
    found: dict[str, list[float]] = {"reference": [], "fast": []}
    for seed in range(SEEDS):
        for name in found:
            trainer = _trainer(session, replace(config, seed=seed, steps=steps), name == "fast", steps)
            for step in range(steps):
                trainer.step(step)
            text = TokenShards(config.data.folder, "held_out", config.batch, config.tokens, device=session.device)
            found[name].append(evaluate(trainer.model, text, 4, n_loops=LOOPS))
            tick()
    return found


def _memory(session: Session, fast: bool, checkpointed: bool) -> int:
    """Bytes that a step takes beyond what the process held before it, gradients of weights not counted."""
    config = replace(parse(TrainConfig, ["tiny"], "train_run", CONFIGS), fast=fast)
    model = build_model(config, config.check(), Ranks(0, 1, session.device))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(config.model.vocab_size, (2, MEMORY_TOKENS // 2 + 1), device=session.device)
    options = {"checkpoint_loops": True} if checkpointed else {}

    def step(tokens: int, loops: int) -> None:
        inputs, targets = ids[:, :tokens], ids[:, 1 : tokens + 1]
        losses(model, inputs, targets, LossConfig(chunk=256), n_loops=loops, **options)[0].backward()

    step(16, 2)  # libraries take memory of their own at their first call
    before = _peak(session.device)
    step(MEMORY_TOKENS // 2, MEMORY_LOOPS)
    return _peak(session.device) - before


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage, whose peak a process inherits from the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
