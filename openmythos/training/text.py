"""The text of a run: its token shards, made if there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openmythos.training.config import TrainConfig
from openmythos.training.data import PrepareConfig, TokenShards, load_tokenizer, prepare
from openmythos.training.data.index import INDEX
from openmythos.training.data.tokenizers import Fingerprint
from openmythos.training.ranks import Ranks


def open_text(config: TrainConfig, cfg: Any, ranks: Ranks) -> tuple[TokenShards, TokenShards]:
    """Training and held-out text, this rank's rows.

    Args:
        cfg: configuration of the model, whose vocabulary must hold the tokenizer's.

    Raises:
        ValueError: naming the key: the shards are of another tokenizer, damaged or too short, or the vocabulary is too
            small. ImportError, OSError: as `prepare`.
    """
    data, folder = config.data, Path(config.data.folder)
    if ranks.first and not (folder / INDEX).exists():
        prepare(PrepareConfig([data.source], str(folder), data.tokenizer, progress=config.log.progress))
    ranks.wait()
    splits = [
        TokenShards(
            folder,
            split,
            config.batch,
            config.tokens,
            config.seed,
            rank=ranks.rank,
            ranks=ranks.ranks,
            device=ranks.device,
        )
        for split in ("train", "held_out")
    ]
    found = splits[0].index.tokenizer
    if not _is(data.tokenizer, found):
        raise ValueError(
            f"data.tokenizer = {data.tokenizer!r}: {folder} was prepared with {found.name!r}; expected that"
        )
    splits[0].check_vocabulary(cfg)
    return splits[0], splits[1]


def _is(tokenizer: str, fingerprint: Fingerprint) -> bool:
    """Whether a tokenizer has this fingerprint; one of the same name is taken to."""
    if tokenizer == fingerprint.name:
        return True
    try:
        return load_tokenizer(tokenizer).fingerprint().sha256 == fingerprint.sha256
    except (ImportError, ValueError):  # it cannot be had here
        return False
