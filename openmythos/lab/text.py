"""Byte models on text, as the experiments on language train and read them.

A training is JSON data, e.g.

    {"model": {"dim": 96, ...}, "depth": {"sampling": "poisson", "mean": 4}, "optimizer": {"lr": 3e-3},
     "loss": {}, "steps": 900, "batch": 16, "tokens": 96, "seed": 0, "fast": true, "shards": null}

with the fields of MythosConfig (of DenseConfig with "n_layers"), DepthConfig (null: as the model has it),
OptimizerConfig and LossConfig. Equal trainings give equal weights, bit by bit on one machine.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig
from openmythos.lab.experiment import Result, Run, Settings
from openmythos.lab.version import code_digest
from openmythos.sizes import build
from openmythos.training.data import Batches, TokenShards, corpus
from openmythos.training.depth import DepthConfig
from openmythos.training.estimate import flops
from openmythos.training.files import replacing
from openmythos.training.losses import LossConfig
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.trainer import Step, Trainer, evaluate

Tick = Callable[[int, int], None]

KEPT = "OPENMYTHOS_LAB_MODELS"
"""Environment variable: the folder in which `shared` keeps trained models for the next experiment that wants the same
one. Unset: each experiment trains its own, with the same result."""

TICKS = 10  # steps between two calls of `tick`
LAST = 20  # steps whose mean is the training loss at the end

# 1 + 1 + 1 blocks of the width that the pilots had. Grouped-query attention with all heads is the quickest there.
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "dim": 96,
    "n_heads": 4,
    "n_kv_heads": 4,
    "max_seq_len": 96,
    "attn_type": "gqa",
    "qk_rope_head_dim": 24,
    "prelude_layers": 1,
    "coda_layers": 1,
    "core_ffn": "dense",
    "ffn_dim": 256,
    "lora_rank": 0,
    "injection": "parcae",
    "h0": "zeros",
    "halting": "off",
    "max_loop_iters": 4,
}
SMALL_TRAINING: dict[str, Any] = {
    "model": SMALL_MODEL,
    "depth": {"sampling": "poisson", "mean": 4, "per": "batch", "max": 24},
    "optimizer": {"lr": 3e-3, "warmup": 50},
    "loss": {"chunk": 0},
    "steps": 900,
    "batch": 16,
    "tokens": 96,
    "fast": True,
    "shards": None,
}
# For tests of the machinery: a few seconds in all.
SMOKE_TRAINING: dict[str, Any] = {
    **SMALL_TRAINING,
    "model": {**SMALL_MODEL, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 32},
    "optimizer": {"lr": 1e-2, "warmup": 5},
    "steps": 40,
    "batch": 8,
    "tokens": 32,
}
# For one GPU: the kernels pay from about this width on. The shards are those that `openmythos prepare` writes.
MEDIUM_MODEL: dict[str, Any] = {
    **SMALL_MODEL,
    "dim": 512,
    "n_heads": 8,
    "n_kv_heads": 8,
    "max_seq_len": 512,
    "attn_type": "mla",
    "kv_lora_rank": 128,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "ffn_dim": 1408,
    "prelude_layers": 2,
    "core_layers": 2,
    "coda_layers": 2,
}
MEDIUM_TRAINING: dict[str, Any] = {
    **SMALL_TRAINING,
    "model": MEDIUM_MODEL,
    "optimizer": {"lr": 1e-3, "warmup": 200},
    "loss": {},
    "steps": 5000,
    "batch": 64,
    "tokens": 512,
    "shards": "data/stdlib",
}
LARGE_MODEL: dict[str, Any] = {
    **MEDIUM_MODEL,
    "dim": 1024,
    "n_heads": 16,
    "n_kv_heads": 16,
    "max_seq_len": 1024,
    "vocab_size": 32768,
    "kv_lora_rank": 256,
    "q_lora_rank": 512,
    "ffn_dim": 2816,
    "prelude_layers": 4,
    "core_layers": 4,
    "coda_layers": 4,
}
LARGE_TRAINING: dict[str, Any] = {
    **MEDIUM_TRAINING,
    "model": LARGE_MODEL,
    "optimizer": {"lr": 6e-4, "warmup": 500},
    "steps": 20000,
    "batch": 128,
    "tokens": 1024,
    "shards": "data/text",
}
TRAININGS: dict[str, dict[str, Any]] = {
    "smoke": SMOKE_TRAINING,
    "small": SMALL_TRAINING,
    "medium": MEDIUM_TRAINING,
    "large": LARGE_TRAINING,
}


def changed(tree: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """`tree` with other values; where both have a dict, its fields change one by one."""
    made = dict(tree)
    for key, value in changes.items():
        held = made.get(key)
        made[key] = {**held, **value} if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return made


class Trained(NamedTuple):
    """A trained model and how it came about.

    Attributes:
        model: in eval mode, on the device of `device()`.
        record: JSON data: "parameters"; "train_loss", the mean over the last steps in nats per token; "skipped", steps
            whose loss or gradient was not finite; "flops" of the training; "mean_depth", loops of a step in the mean.
    """

    model: Any
    record: dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(training: Settings) -> MythosConfig:
    """The configuration of a training's model."""
    fields = training["model"]
    return DenseConfig(**fields) if "n_layers" in fields else MythosConfig(**fields)


def shared(training: Settings, tick: Tick) -> Trained:
    """`trained`, for models that several experiments read: taken from the folder of `KEPT` or put there."""
    folder = os.environ.get(KEPT, "")
    if not folder:
        return trained(training, tick)
    file = Path(folder) / f"{identity(training)}.pt"
    if file.exists():
        held = torch.load(file, map_location=device(), weights_only=True)
        model = build_model(training)
        model.load_state_dict(held["weights"])
        return Trained(model.eval(), json.loads(held["record"]))
    made = trained(training, tick)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        torch.save({"weights": made.model.state_dict(), "record": json.dumps(made.record)}, part)
    return made


def identity(training: Settings) -> str:
    """The name under which a trained model is kept: a digest of all that its weights depend on."""
    depends = [training, code_digest(trained), torch.__version__, platform.python_version(), device().type]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:20]


def build_model(training: Settings) -> Any:
    """The model before its first step."""
    with torch.random.fork_rng([]):
        torch.random.default_generator.manual_seed(training["seed"])
        model = build(config(training))
    model = model.to(device())
    if training["fast"]:
        importlib.import_module("openmythos_kernels").accelerate(model)
    return model


def trained(training: Settings, tick: Tick, watch: Callable[[nn.Module, Step], None] | None = None) -> Trained:
    """Trains a model.

    Args:
        watch: called after every step with the model and the step's record.
    """
    model = build_model(training)
    depth = None if training["depth"] is None else DepthConfig(**training["depth"])
    steps = training["steps"]
    trainer = Trainer(
        model,
        text(training, "train"),
        steps,
        depth=depth,
        loss=LossConfig(**training["loss"]),
        optimization=OptimizerConfig(**training["optimizer"]),
        autocast=device().type == "cuda",
        seed=training["seed"],
    )
    losses, skipped, loops = [], 0, 0.0
    for step in range(steps):
        done = trainer.step(step)
        losses.append(done.loss)
        skipped += done.skipped
        loops += done.depth
        if watch is not None:
            watch(model, done)
        if (step + 1) % TICKS == 0 or step + 1 == steps:
            tick(step + 1, steps)
    finite = [loss for loss in losses[-LAST:] if np.isfinite(loss)]
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": float(np.mean(finite)) if finite else None,
        "skipped": skipped,
        "flops": training_flops(training),
        "mean_depth": loops / steps,
    }
    return Trained(model.eval(), record)


def training_flops(training: Settings) -> float:
    """Floating-point operations of a training, a multiply-add counting 2, at the mean number of loops."""
    cfg = config(training)
    depth = None if training["depth"] is None else DepthConfig(**training["depth"])
    loops = cfg.max_loop_iters if depth is None else depth.mean
    graded = None if depth is None else depth.gradient_loops
    tokens = training["tokens"]
    return flops(cfg, tokens).training(loops, graded) * training["steps"] * training["batch"] * tokens


def text(training: Settings, split: str, batch: int | None = None, part: tuple[int, int] = (0, 1)) -> Any:
    """The batches of a training's text: `data[step]` is (inputs, targets), (batch, tokens) int64 each.

    Args:
        split: "train" or "held_out".
        batch: rows; None: those of the training.
        part: (i, n): the i-th of n disjoint parts of the held-out text.

    Raises:
        ValueError: there are no shards in the folder that the training names.
    """
    rows, tokens = batch or training["batch"], training["tokens"]
    i, parts = part
    if training["shards"] is not None:
        data = TokenShards(training["shards"], split, rows, tokens, training["seed"], device=device())
        return data if parts == 1 else _Part(data, i, parts)
    texts = corpus()
    if split == "train":
        return Batches(texts.train, rows, tokens, training["seed"], device())
    held = texts.validation
    size = len(held) // parts
    # Every model is read on the same windows, so that differences between models are not those of texts.
    return Batches(held[i * size : (i + 1) * size], rows, tokens, 0, device())


@dataclass(frozen=True)
class _Part:
    """Every n-th batch, from the i-th on."""

    data: Any
    i: int
    n: int

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.data[self.i + step * self.n]


def batches(training: Settings, reading: Settings, part: tuple[int, int] = (0, 1)) -> list[tuple[Tensor, Tensor]]:
    """The held-out batches that `reading` = {"rows": ..., "batches": ...} names."""
    data = text(training, "held_out", reading["rows"], part)
    return [data[step] for step in range(reading["batches"])]


def loss_by_loops(model: Any, training: Settings, reading: Settings, loops: Iterable[int]) -> list[float]:
    """Held-out loss in nats per token with each number of loops, on the same text."""
    data = text(training, "held_out", reading["rows"])
    chunk = training["loss"].get("chunk", LossConfig.chunk)
    bf16 = device().type == "cuda"
    return [evaluate(model, data, reading["batches"], n_loops=n, bf16=bf16, chunk=chunk) for n in loops]


def loss_of(model: Any, training: Settings, reading: Settings) -> float:
    """Held-out loss in nats per token with the configured loops, or of a dense model."""
    data = text(training, "held_out", reading["rows"])
    chunk = training["loss"].get("chunk", LossConfig.chunk)
    return evaluate(model, data, reading["batches"], bf16=device().type == "cuda", chunk=chunk)


def left_over(loss: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares fit of losses (n,) by the columns of basis (n, k), and residuals to draw again, (n,) each.

    The residuals are enlarged: by the degrees of freedom that the fit took, and as Student's t is wider than the normal
    distribution for those that it left. Else intervals from few runs would be too short.
    """
    fitted = basis @ (np.linalg.pinv(basis) @ loss)
    free = max(len(loss) - basis.shape[1], 1)
    z = 1.96  # of a 95 % interval; the series is good to 4 % from three degrees of freedom on
    wider = 1 + (z**2 + 1) / (4 * free) + (5 * z**4 + 16 * z**2 + 3) / (96 * free**2)
    return fitted, (loss - fitted) * np.sqrt(len(loss) / free) * wider


def each_training(
    compute: Callable[[Settings, Tick], dict[str, Any]],
    settings: Settings,
    seeds: Sequence[int],
    read: Sequence[str],
    about: Callable[[str, Settings], Settings] = lambda name, training: {"variant": name},
) -> list[Run]:
    """A run for each seed and each of the settings' trainings, all trainings of a seed before the next seed.

    Args:
        read: names of further settings that a run reads.
        about: (name, training) -> settings that say of which kind the run is.
    """
    return [
        Run(
            f"{name}-seed{seed}",
            {
                **about(name, training),
                "seed": seed,
                "training": {**training, "seed": seed},
                **{key: settings[key] for key in read},
            },
            compute,
        )
        for seed in seeds
        for name, training in settings["trainings"].items()
    ]


def by_variant(results: Sequence[Result]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """variant -> seed -> what its run found, by the settings "variant" and "seed" of the runs."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result.settings["variant"], {})[result.settings["seed"]] = result.found
    return {variant: dict(sorted(seeds.items())) for variant, seeds in found.items()}
