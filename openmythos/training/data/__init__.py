"""Text for training: bytes in memory, or token shards on a disk."""

from openmythos.training.data.bytes import VOCABULARY, Batches, Corpus, corpus
from openmythos.training.data.index import Index, read_index
from openmythos.training.data.prepare import PrepareConfig, prepare
from openmythos.training.data.shards import TokenShards
from openmythos.training.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "VOCABULARY",
    "Batches",
    "Corpus",
    "Index",
    "PrepareConfig",
    "TokenShards",
    "Tokenizer",
    "corpus",
    "load_tokenizer",
    "prepare",
    "read_index",
]
