"""Token shards from text and a tokenizer, resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence

from openmythos.commands.parsing import parse, split
from openmythos.training.data import PrepareConfig, prepare


def main(arguments: Sequence[str]) -> None:
    """`openmythos prepare SOURCE ... [key=value ...]`"""
    sources, options = split(arguments)
    listed = [f"sources={json.dumps(sources)}"] if sources else []
    config = parse(PrepareConfig, [*options, *listed], "openmythos prepare")
    index = prepare(config)
    counts = ", ".join(f"{index.tokens(part):,} {part}" for part in index.shards)
    print(f"{config.out}: {index.documents:,} documents, tokens: {counts}; vocabulary {index.vocab_size:,}")
