"""`openmythos train tiny`: speed and loss with the fast modules and without, and the memory that checkpoints save.

The losses are those of short runs, since a run of `tiny` takes minutes; three seeds of the reference show how far runs
lie apart anyway.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
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
            f"{'fast' if f else 'reference'}, {'checkpoint_loops' if c else 'all'}": dict(zip(("live", "held"), n))
            for (f, c), n in kept.items()
        },
        "requirements": [row.as_dict() for row in rows],
    }


def _memory_row(kept: dict[tuple[bool, bool], tuple[int, int]], fast: bool) -> Requirement:
    (all_live, all_held), (live, held) = kept[fast, False], kept[fast, True]
    return Requirement(
        f"peak memory of a step, {MEMORY_TOKENS} tokens, {MEMORY_LOOPS} loops, checkpoint_loops, "
        + ("fast modules" if fast else "reference"),
        0.35,
        live / all_live,
        "x without",
        False,
        higher=False,
        detail=f"{all_live / 2**20:.0f} -> {live / 2**20:.0f} MiB of tensors; with what allocators hold on to "
        f"{all_held / 2**20:.0f} -> {held / 2**20:.0f} MiB",
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


def _memory(session: Session, fast: bool, checkpointed: bool) -> tuple[int, int]:
    """Bytes at the peak of a step beyond what there was before it, gradients of weights not counted: of tensors, and
    of the process (on a GPU: of the allocator)."""
    config = replace(parse(TrainConfig, ["tiny"], "train_run", CONFIGS), fast=fast)
    model = build_model(config, config.check(), Ranks(0, 1, session.device))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(config.model.vocab_size, (2, MEMORY_TOKENS // 2 + 1), device=session.device)
    options = {"checkpoint_loops": True} if checkpointed else {}

    def step(tokens: int = MEMORY_TOKENS // 2, loops: int = MEMORY_LOOPS) -> None:
        inputs, targets = ids[:, :tokens], ids[:, 1 : tokens + 1]
        losses(model, inputs, targets, LossConfig(chunk=256), n_loops=loops, **options)[0].backward()

    step(16, 2)  # libraries take memory of their own at their first call
    if session.device.type == "cuda":
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        step()
        return torch.cuda.max_memory_allocated() - before[0], torch.cuda.max_memory_reserved() - before[1]
    held = _most_held()
    step()
    return _live_at_peak(step), _most_held() - held


def _live_at_peak(work: Callable[[], None]) -> int:
    """Bytes of CPU tensors at the peak of `work`, beyond those before it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def _most_held() -> int:
    """The most memory that this process ever had, in bytes."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
