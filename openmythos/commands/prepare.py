"""Token shards from text and a tokenizer, resumable."""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.commands.parsing import parse
from openmythos.training.data import PrepareConfig, prepare


def main(arguments: Sequence[str]) -> None:
    """`openmythos prepare SOURCE ... [key=value ...]`"""
    sources = [word for word in arguments if "=" not in word and not word.startswith("-")]
    options = [word for word in arguments if word not in sources]
    listed = [f"sources={list(sources)!r}".replace("'", '"')] if sources else []
    index = prepare(parse(PrepareConfig, [*options, *listed], "openmythos prepare"))
    print(index)
