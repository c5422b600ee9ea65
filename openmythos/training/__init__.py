"""Training on text: token shards, runs from one configuration, checkpoints that resume exactly."""

from openmythos.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from openmythos.training.config import TrainConfig
from openmythos.training.data import (
    VOCABULARY,
    Batches,
    Corpus,
    PrepareConfig,
    TokenShards,
    corpus,
    load_tokenizer,
    prepare,
)
from openmythos.training.depth import DepthConfig, draw_depths
from openmythos.training.estimate import Estimate, estimate
from openmythos.training.halting_head import HaltingFit, fit_halting
from openmythos.training.losses import LossConfig, losses, token_losses
from openmythos.training.optimizers import Average, OptimizerConfig, make_optimizer
from openmythos.training.plot import plot_runs
from openmythos.training.run import Diverged, Result, run
from openmythos.training.saturation import Saturation, fit_saturation
from openmythos.training.schedule import learning_rate
from openmythos.training.trained import load_run
from openmythos.training.trainer import Step, Trainer, evaluate, train

__all__ = [
    "VOCABULARY",
    "Average",
    "Batches",
    "Corpus",
    "DepthConfig",
    "Diverged",
    "Estimate",
    "HaltingFit",
    "LossConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "Result",
    "Saturation",
    "Step",
    "TokenShards",
    "TrainConfig",
    "Trainer",
    "corpus",
    "draw_depths",
    "estimate",
    "evaluate",
    "fit_halting",
    "fit_saturation",
    "learning_rate",
    "load_checkpoint",
    "load_model",
    "load_run",
    "load_tokenizer",
    "losses",
    "make_optimizer",
    "plot_runs",
    "prepare",
    "run",
    "save_checkpoint",
    "token_losses",
    "train",
]
