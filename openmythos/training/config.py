"""The configuration of a training run: one tree of dataclasses for files, command line and documentation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

import torch

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig, checked_integer
from openmythos.parallel.plan import Plan
from openmythos.training.depth import DepthConfig
from openmythos.training.losses import LossConfig
from openmythos.training.optimizers import OptimizerConfig
from openmythos.training.ranks import Device
from openmythos.variants import VARIANTS


@dataclass(frozen=True)
class DataConfig:
    """The text to train on.

    Attributes:
        folder: token shards that `openmythos prepare` has written. If there are none, they are made from `source`.
        source: what to prepare; "stdlib" is the Python standard library's text.
        tokenizer: what to prepare it with.
    """

    folder: str = "data/stdlib"
    source: str = "stdlib"
    tokenizer: str = "bytes"


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats.

    Attributes:
        mode: fp32. autocast: bfloat16 products, float32 weights and optimizer. bf16: everything in bfloat16.
        stochastic_rounding: round weights to bfloat16 at random, up or down by their distance, so that small steps are
            not lost; for mode bf16 with adamw, needs torchao.
    """

    mode: Literal["fp32", "autocast", "bf16"] = "fp32"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        if self.stochastic_rounding and self.mode != "bf16":
            raise ValueError(f'precision.stochastic_rounding = True: needs precision.mode = "bf16", not "{self.mode}"')

    @property
    def products(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.float32 if self.mode == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class MemoryConfig:
    """What is computed again in the backward pass rather than kept.

    Attributes:
        checkpoint_loops: keep the inputs of each loop alone.
        checkpoint_layers: keep the inputs of each prelude and coda block alone.
    """

    checkpoint_loops: bool = False
    checkpoint_layers: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, in `out`/checkpoints. It is always saved at its end and on SIGTERM.

    Attributes:
        every: steps between checkpoints; 0: none on the way.
        keep: newest checkpoints that stay.
        asynchronous: write while training goes on.
    """

    every: int = 50
    keep: int = 2
    asynchronous: bool = False

    def __post_init__(self) -> None:
        checked_integer("checkpoint.every", self.every, 0)
        checked_integer("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss on the way and at the end.

    Attributes:
        every: steps between evaluations; 0: at the end alone.
        batches: batches of held-out text, the same each time.
    """

    every: int = 100
    batches: int = 8

    def __post_init__(self) -> None:
        checked_integer("evaluation.every", self.every, 0)
        checked_integer("evaluation.batches", self.batches, 1)


@dataclass(frozen=True)
class LogConfig:
    """What is recorded in `out`/log.jsonl, and shown.

    Attributes:
        every: steps between records.
        routing_every: steps between records of expert load, of overlap between loops and of exit depths; 0: none.
        tensorboard: also write TensorBoard's files, if it is installed.
        wandb: project of Weights & Biases to log to; empty: none.
        progress: show a progress bar.
    """

    every: int = 1
    routing_every: int = 0
    tensorboard: bool = True
    wandb: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        checked_integer("log.every", self.every, 1)
        checked_integer("log.routing_every", self.routing_every, 0)


def _model_config() -> type:
    """Every field of MythosConfig and DenseConfig, unset by default."""
    hints = {**get_type_hints(MythosConfig), **get_type_hints(DenseConfig)}
    names = [f.name for f in fields(DenseConfig)]
    made = make_dataclass(
        "ModelConfig",
        [
            ("kind", Literal["looped", "dense"], field(default="looped")),
            ("size", str, field(default="")),
            *[(name, hints[name] | None, field(default=None)) for name in names],
        ],
        frozen=True,
    )
    made.__module__ = __name__
    described = (MythosConfig.__doc__ or "").split("    Attributes:\n")[1].split("\n\n")[0]
    made.__doc__ = f"""The model. What is unset is as in `size`, or else MythosConfig's default.

    Attributes:
        kind: looped: an OpenMythos. dense: a DenseTransformer to compare it with, as which a dense size counts anyway.
        size: a named size to begin with: {", ".join(VARIANTS)}.
        n_layers: blocks of a dense model.
{described}
    """
    return made


ModelConfig: Any = _model_config()


def model_config(model: Any) -> MythosConfig:
    """The configuration that a ModelConfig describes.

    Raises:
        ValueError: naming the field.
    """
    if model.size and model.size not in VARIANTS:
        raise ValueError(f"model.size = {model.size!r}: must be empty or one of {', '.join(VARIANTS)}")
    base = VARIANTS[model.size]() if model.size else None
    kind = DenseConfig if isinstance(base, DenseConfig) or model.kind == "dense" else MythosConfig
    values = {} if base is None else {f.name: getattr(base, f.name) for f in fields(kind) if hasattr(base, f.name)}
    asked = {f.name: getattr(model, f.name) for f in fields(DenseConfig) if getattr(model, f.name) is not None}
    if kind is MythosConfig and "n_layers" in asked:
        raise ValueError(f'model.n_layers = {asked["n_layers"]}: must be unset for model.kind = "looped"')
    return kind(**{**values, **asked})


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        out: folder of the run: configuration, log, checkpoints, model, plots.
        steps: optimizer steps in all.
        batch: sequences of a step, over all ranks.
        tokens: tokens of a sequence.
        accumulate: parts in which a rank computes its share of a step, one after the other.
        seed: of the weights, the order of the text, the depths and dropout.
        fast: swap in the modules of openmythos_kernels.
        device: auto, cpu or cuda.
        resume: go on from the newest checkpoint in `out`. False: `out` must be without any.
        patience: steps in a row with a loss or gradient that is not finite, which are skipped, before the run ends.
        model: the model.
        data: the text.
        depth: loops of a step.
        loss: what is minimized.
        optimizer: how weights follow gradients.
        precision: number formats.
        memory: what is kept for the backward pass.
        parallel: how ranks divide the work.
        checkpoint: when the run is saved.
        evaluation: held-out loss.
        log: what is recorded.
    """

    out: str = "runs/train"
    steps: int = 1000
    batch: int = 16
    tokens: int = 256
    accumulate: int = 1
    seed: int = 0
    fast: bool = True
    device: Device = "auto"
    resume: bool = True
    patience: int = 10
    model: ModelConfig = field(default_factory=ModelConfig)  # type: ignore[valid-type]
    data: DataConfig = field(default_factory=DataConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: Plan = field(default_factory=Plan)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("tokens", 1), ("accumulate", 1), ("seed", 0), ("patience", 1)):
            checked_integer(name, getattr(self, name), least)
        if self.precision.stochastic_rounding and self.optimizer.name != "adamw":
            raise ValueError('precision.stochastic_rounding = True: needs optimizer.name = "adamw"')

    def check(self, ranks: int = 1) -> MythosConfig:
        """What can be known before anything is made.

        Returns:
            The model's configuration.

        Raises:
            ValueError: naming the key, what came and what was expected.
        """
        cfg = model_config(self.model)
        self.loss.check_model(cfg)
        if self.memory.checkpoint_loops and isinstance(cfg, DenseConfig):
            raise ValueError("memory.checkpoint_loops = True: must be False for a dense model")
        if self.tokens > cfg.max_seq_len:
            raise ValueError(f"tokens = {self.tokens}: must be <= model.max_seq_len = {cfg.max_seq_len}")
        if self.batch % (ranks * self.accumulate):
            raise ValueError(
                f"batch = {self.batch}: must be a multiple of {ranks} ranks * accumulate = {self.accumulate}"
            )
        plan = self.parallel.over(ranks)
        if self.optimizer.ema and (plan.shard > 1 or plan.expert > 1):
            raise ValueError(f"optimizer.ema = {self.optimizer.ema}: must be 0 where ranks divide the model")
        if self.optimizer.name == "muon" and plan.shard > 1:
            raise ValueError(
                'optimizer.name = "muon": must be "adamw" with parallel.shard > 1; Muon needs whole matrices'
            )
        if cfg.n_experts % self.parallel.expert:
            raise ValueError(f"parallel.expert = {self.parallel.expert}: must divide model.n_experts = {cfg.n_experts}")
        return cfg


# Keys that a resumed run may change: they do not change what is computed, or only how far.
FREE = (
    "out",
    "fast",
    "device",
    "resume",
    "patience",
    "parallel",
    "checkpoint",
    "evaluation",
    "log",
    "accumulate",
    "memory",
)


def differences(before: dict, now: dict) -> list[str]:
    """What keeps a run from going on as another: "key was x, is y" for each key that must not change."""

    def flat(tree: dict, prefix: str = "") -> dict:
        found = {}
        for key, value in tree.items():
            found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return found

    a, b = (flat({k: v for k, v in tree.items() if k not in FREE}) for tree in (before, now))
    return [f"{key} was {a.get(key)!r}, is {b.get(key)!r}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
