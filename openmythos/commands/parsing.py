"""Configurations from the command line: a dataclass, a file in TOML, and `key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], prog: str, named: Path | None = None) -> T:
    """An instance of the dataclass `kind`, whose fields are the keys.

    Args:
        arguments: a TOML file, or the name of one in `named` without its ending; then any number of `key=value`.
            `--help` shows every key and leaves.
        prog: the command, for messages.
        named: folder of named configurations.

    Raises:
        ValueError: an unknown key, a value that does not fit, or no such file.
        ImportError: without the jsonargparse package.
    """
    library = _library()
    parser = library.ArgumentParser(
        prog=prog, usage=f"{prog} [CONFIG] [key=value ...]", parser_mode="toml", exit_on_error=False
    )
    parser.add_class_arguments(kind, None, as_group=True)
    if asks_help(arguments):
        parser.parse_args(["--help"])
    files, given = split(arguments)
    if len(files) > 1:
        raise ValueError(f"CONFIG: got {' and '.join(files)}; expected one file, and key=value for the rest")
    keys = set(parser.get_defaults().keys())
    try:
        found = parser.parse_path(str(_file(files[0], named))) if files else parser.get_defaults()
        options = []
        for word in given:
            key = word.lstrip("-").partition("=")[0]
            if key not in keys:
                raise ValueError(f"{key}: no such key{_nearest(key, keys)}; --help shows them all")
            options.append("--" + word.lstrip("-"))
        made = parser.instantiate(parser.parse_args(options, namespace=found))
        return kind(**{f.name: getattr(made, f.name) for f in fields(kind)})  # type: ignore[arg-type]
    except (library.ArgumentError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def asks_help(arguments: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Plain words, and options: `key=value` and what begins with a dash."""
    words = [word for word in arguments if "=" not in word and not word.startswith("-")]
    return words, [word for word in arguments if word not in words]


def run_and_config(kind: type[T], arguments: Sequence[str], prog: str) -> tuple[Path, T]:
    """The folder of a run, and a configuration from the rest of the arguments.

    Raises:
        ValueError: as `parse`, or there is not one folder.
    """
    runs, options = split(arguments)
    if len(runs) != 1 and not asks_help(arguments):
        raise ValueError(f"usage: {prog} RUN [key=value ...]; --help shows the keys")
    config = parse(kind, options, f"{prog} RUN")
    return Path(runs[0]), config


def write(config: Any, path: Path) -> None:
    """Writes a configuration as a file that `parse` reads."""
    _library()
    import toml

    def without_none(tree: dict) -> dict:
        return {k: without_none(v) if isinstance(v, dict) else v for k, v in tree.items() if v is not None}

    path.write_text(toml.dumps(without_none(asdict(config))))


def _file(name: str, named: Path | None) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted(named.glob("*.toml"))} if named is not None else {}
    if name not in known:
        rest = f", nor one of {', '.join(known)}" if known else ""
        raise ValueError(f"CONFIG = {name!r}: no such file{rest}")
    return known[name]


def _nearest(key: str, keys: set[str]) -> str:
    near = difflib.get_close_matches(key, keys, 1)
    return f", did you mean {near[0]}?" if near else ""


def _library() -> Any:
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError("this command needs jsonargparse: pip install 'jsonargparse[signatures,toml]'") from error
    return jsonargparse
