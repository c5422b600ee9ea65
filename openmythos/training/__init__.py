"""Training on text: byte-level data, a minimal trainer, checkpoints that resume exactly."""

from openmythos.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from openmythos.training.data import VOCABULARY, Batches, Corpus, corpus
from openmythos.training.schedule import learning_rate
from openmythos.training.trainer import Step, evaluate, make_optimizer, train

__all__ = [
    "VOCABULARY",
    "Batches",
    "Corpus",
    "Step",
    "corpus",
    "evaluate",
    "learning_rate",
    "load_checkpoint",
    "load_model",
    "make_optimizer",
    "save_checkpoint",
    "train",
]
