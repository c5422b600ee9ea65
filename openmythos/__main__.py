"""`python -m openmythos COMMAND`, also installed as `openmythos`."""

from __future__ import annotations

import importlib
import sys

from openmythos.commands import COMMANDS


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: openmythos COMMAND ...; openmythos COMMAND --help\n\nRecurrent-Depth Transformers in PyTorch.\n")
        for name in COMMANDS:
            print(f"  {name:<12}{(_command(name).__doc__ or '').splitlines()[0]}")
        return
    if arguments[0] not in COMMANDS:
        print(f"openmythos: COMMAND = {arguments[0]}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        _command(arguments[0]).main(arguments[1:])
    except (ValueError, ImportError, OSError, ArithmeticError) as error:
        print(f"openmythos {arguments[0]}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)  # 2: what was asked for cannot be done


def _command(name: str):
    return importlib.import_module(f"openmythos.commands.{name.replace('-', '_')}")


if __name__ == "__main__":
    main()
