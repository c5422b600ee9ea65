"""A halting head for the model of a run, fitted on its states; other weights stay."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openmythos.baseline import DenseTransformer
from openmythos.calibrate import counting_loops
from openmythos.commands.parsing import run_and_config
from openmythos.config import checked_integer, setting
from openmythos.exits import HeadExit
from openmythos.training.checkpoint import save_checkpoint
from openmythos.training.data import TokenShards
from openmythos.training.halting_head import fit_halting, halting_error, settled_states
from openmythos.training.ranks import Device
from openmythos.training.trained import load_run
from openmythos.training.trainer import evaluate


@dataclass(frozen=True)
class FitHaltingConfig:
    """A halting head for a run's model: after it, `exit=head` leaves the loop where the prediction is final.

    Attributes:
        loops: loops after which a prediction counts as final; 0: as configured.
        batches: batches of training text to fit on. As many held-out ones show what came of it.
        batch: sequences of a batch.
        tokens: tokens of a sequence; 0: as in training.
        threshold: probability beyond which a position halts, for what is shown.
        out: folder for a run with the fitted model; empty: RUN, for a model with halting="off" alone, of which nothing
            else reads the head.
        data: folder of token shards; empty: the run's.
        fast: swap in the modules of openmythos_kernels.
        device: auto, cpu or cuda.
    """

    loops: int = 0
    batches: int = 4
    batch: int = 8
    tokens: int = 0
    threshold: float = 0.5
    out: str = ""
    data: str = ""
    fast: bool = True
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name, least in (("loops", 0), ("batches", 1), ("batch", 1), ("tokens", 0)):
            checked_integer(name, getattr(self, name), least)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: must be in 0 .. 1")


def main(arguments: Sequence[str]) -> None:
    """`openmythos fit-halting RUN [key=value ...]`; writes OUT/model.pt"""
    folder, config = run_and_config(FitHaltingConfig, arguments, "openmythos fit-halting")
    model, tree = load_run(folder, config.fast, config.device)
    if isinstance(model, DenseTransformer):
        raise ValueError(f"RUN = {folder}: a dense model, expected one with loops")
    if not config.out and (halting := setting(model.cfg, "halting")) != "off":
        raise ValueError(f'out = "": must be a folder for a model with halting="{halting}", whose ACT reads the head')
    device = next(model.parameters()).device
    size = config.batch, config.tokens or tree["tokens"]
    text, held_out = (
        TokenShards(config.data or tree["data"]["folder"], split, *size, device=device)
        for split in ("train", "held_out")
    )
    text.check_vocabulary(model.cfg)
    loops, chunk = config.loops or None, tree["loss"]["chunk"]
    tested = [held_out[i] for i in range(config.batches)]
    states = settled_states(model, tested, loops, chunk)
    before = halting_error(model, *states)
    fit = fit_halting(model, (text[i] for i in range(config.batches)), loops, chunk=chunk)
    print(f"head      {fit.before:.4f} -> {fit.after:.4f} nats on {fit.states} states, {fit.settled:.1%} of them final")
    print(f"held out  {before:.4f} -> {halting_error(model, *states):.4f} nats")
    whole = evaluate(model, tested, config.batches, n_loops=loops, chunk=chunk)
    with counting_loops(model) as count:
        early = evaluate(model, tested, config.batches, n_loops=loops, chunk=chunk, exit=HeadExit(config.threshold))
    print(f"loss      {whole:.4f} with every loop, {early:.4f} with exit=head after {count.mean:.2f} in the mean")
    out = Path(config.out) if config.out else folder
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != folder.resolve():
        shutil.copy(folder / "config.json", out / "config.json")
    save_checkpoint(out / "model.pt", model, step=tree["steps"])
    print(out / "model.pt")
