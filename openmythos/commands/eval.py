"""Perplexity of held-out text by number of loops, with the curve it saturates along."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from openmythos.baseline import DenseTransformer
from openmythos.calibrate import LoopCount, counting_loops
from openmythos.commands.parsing import run_and_config
from openmythos.config import checked_integer
from openmythos.training.data import TokenShards
from openmythos.training.ranks import Device
from openmythos.training.saturation import fit_saturation, plot_saturation
from openmythos.training.trained import load_run
from openmythos.training.trainer import evaluate


@dataclass(frozen=True)
class EvalConfig:
    """An evaluation of a run's model.

    Attributes:
        loops: numbers of loops to compare.
        batches: batches of held-out text.
        batch: sequences of a batch.
        tokens: tokens of a sequence; 0: as in training.
        data: folder of token shards; empty: the run's.
        exit: rule by which positions leave the loop early: act, head, latent, kl, confidence, entropy or argmax; empty:
            the model's halting.
        fast: swap in the modules of openmythos_kernels.
        device: auto, cpu or cuda.
    """

    loops: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 8, 12, 16])
    batches: int = 8
    batch: int = 8
    tokens: int = 0
    data: str = ""
    exit: str = ""
    fast: bool = True
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("batch", 1), ("tokens", 0)):
            checked_integer(name, getattr(self, name), least)
        if not self.loops or min(self.loops) < 1:
            raise ValueError(f"loops = {self.loops}: must be integers >= 1")


def main(arguments: Sequence[str]) -> None:
    """`openmythos eval RUN [key=value ...]`; writes RUN/loops.json and RUN/loops.png"""
    folder, config = run_and_config(EvalConfig, arguments, "openmythos eval")
    model, tree = load_run(folder, config.fast, config.device)
    device = next(model.parameters()).device
    text = TokenShards(
        config.data or tree["data"]["folder"], "held_out", config.batch, config.tokens or tree["tokens"], device=device
    )
    text.check_vocabulary(model.cfg)
    bf16 = tree["precision"]["mode"] == "autocast"
    dense = isinstance(model, DenseTransformer)
    if config.exit and dense:
        raise ValueError(f"exit = {config.exit}: must be empty for a dense model")
    losses, depths = {}, {}
    with torch.no_grad():
        for loops in tqdm([0] if dense else sorted(set(config.loops)), unit="depth"):
            options = dict(n_loops=loops or None, bf16=bf16, chunk=tree["loss"]["chunk"], exit=config.exit or None)
            with nullcontext(LoopCount()) if dense else counting_loops(model) as count:
                losses[loops] = evaluate(model, text, config.batches, **options)
            depths[loops] = count.mean
    fit = fit_saturation(losses) if len(losses) >= 4 else None
    halts = not math.isnan(max(depths.values()))  # else nobody has counted
    print("loops  loss    perplexity" + ("  mean depth" if halts else ""))
    for loops, loss in losses.items():
        depth = f"  {depths[loops]:.2f}" if halts else ""
        print(f"{loops or '-':>5}  {loss:.4f}  {math.exp(loss):<10.3f}{depth}".rstrip())
    if fit is not None:
        print(f"loss = {fit.floor:.4f} + {fit.gain:.4f} exp(-{fit.rate:.4g} loops), rmse {fit.rmse:.1e}")
    ran = {"depths": depths} if halts else {}
    (folder / "loops.json").write_text(
        json.dumps({"losses": losses, "fit": None if fit is None else fit._asdict(), **ran}, indent=1) + "\n"
    )
    if not dense:
        plot_saturation(losses, fit, folder / "loops.png", tree["depth"]["mean"])
        print(folder / "loops.png")
