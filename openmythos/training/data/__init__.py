"""Text for training: bytes in memory, or token shards on a disk."""

from openmythos.training.data.bytes import VOCABULARY, Batches, Corpus, corpus

__all__ = ["VOCABULARY", "Batches", "Corpus", "corpus"]
