"""From text to a trained model, resumable at any moment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from openmythos.commands.parsing import asks_help, parse
from openmythos.training.config import TrainConfig
from openmythos.training.estimate import UTILIZATION, Estimate, estimate, measured_peak
from openmythos.training.ranks import compute_device

CONFIGS = Path(__file__).parent.parent / "training" / "configs"

HELP = """openmythos train CONFIG [--dry-run] [key=value ...]
torchrun --nproc-per-node N -m openmythos train CONFIG [key=value ...]

CONFIG: a TOML file, or one of {names}.
--dry-run [RANKS]: print parameters, FLOPs, bytes per rank and an estimated time of a step; nothing is allocated.

The same command again goes on where a run was stopped, whatever stopped it."""


def main(arguments: Sequence[str]) -> None:
    """`openmythos train CONFIG [--dry-run [RANKS]] [key=value ...]`"""
    arguments = list(arguments)
    if not arguments or asks_help(arguments):
        print(HELP.format(names=", ".join(sorted(path.stem for path in CONFIGS.glob("*.toml")))) + "\n")
    dry, ranks = "--dry-run" in arguments, int(os.environ.get("WORLD_SIZE", 1))
    if dry:
        at = arguments.index("--dry-run")
        del arguments[at]
        if at < len(arguments) and arguments[at].isdigit():
            ranks = int(arguments.pop(at))
    config = parse(TrainConfig, arguments or ["--help"], "openmythos train", CONFIGS)
    if dry:
        peak = measured_peak(compute_device(config.device), config.precision.products)
        print(describe(config, estimate(config, ranks, peak), ranks, peak))
        return
    from openmythos.training.run import run

    result = run(config)
    if int(os.environ.get("RANK", 0)) == 0:
        if result.finished:
            print(f"{result.out}: {result.steps} steps, held-out loss {result.held_out:.4f} nats per token")
        else:
            print(f"{result.out}: saved after {result.steps} of {config.steps} steps; the same command goes on")


def describe(config: TrainConfig, cost: Estimate, ranks: int, peak: float) -> str:
    """An estimate as lines to read."""
    rows = [
        ("parameters", f"{cost.parameters / 1e9:.3f} B, {cost.active / 1e9:.3f} B of them for a token"),
        ("a step", f"{config.batch * config.tokens:,} tokens, {cost.step_flops / 1e12:,.2f} TFLOP"),
        ("ranks", f"{ranks}: shard {config.parallel.shard}, expert {config.parallel.expert}"),
        ("bytes per rank", f"{_gb(cost.total)}, of which"),
        ("  weights", _gb(cost.rank.parameters)),
        ("  gradients", _gb(cost.rank.gradients)),
        ("  optimizer", _gb(cost.rank.optimizer)),
        ("  averages", _gb(cost.averages)),
        ("  gathered", f"{_gb(cost.rank.gathered)} (weights and gradients that FSDP2 holds whole during a step)"),
        ("  activations", f"{_gb(cost.activations)} (estimate)"),
        ("  logits", _gb(cost.logits)),
    ]
    if ranks > 1:
        rows.append(("sent in a step", f"{_gb(cost.sent)} by each rank"))
    if cost.step_seconds is not None:
        share = f"{UTILIZATION:.0%} of {peak / 1e12:.3g} TFLOP/s, measured on this machine"
        rows.append(("time of a step", f"{cost.step_seconds:.3g} s at {share} (estimate)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
