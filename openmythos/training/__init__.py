"""Training on text: bytes or token shards, a minimal trainer, checkpoints that resume exactly."""

from openmythos.training.checkpoint import load_checkpoint, load_model, save_checkpoint
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
from openmythos.training.schedule import learning_rate
from openmythos.training.trainer import Step, evaluate, make_optimizer, train

__all__ = [
    "VOCABULARY",
    "Batches",
    "Corpus",
    "PrepareConfig",
    "Step",
    "TokenShards",
    "corpus",
    "evaluate",
    "learning_rate",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "make_optimizer",
    "prepare",
    "save_checkpoint",
    "train",
]
