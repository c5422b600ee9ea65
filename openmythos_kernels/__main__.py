"""`python -m openmythos_kernels info`."""

from __future__ import annotations

import argparse

from openmythos_kernels.runtime.info import describe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m openmythos_kernels", description="Fast kernels for looped transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, the compiled extension, and which backend runs each op and why")
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
