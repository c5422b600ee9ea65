"""`python -m openmythos sizes`: the cost of the named configurations."""

from __future__ import annotations

import argparse

from openmythos.sizes import table
from openmythos.variants import VARIANTS

NOTE = """
active: parameters that one token uses (K of E experts, looped blocks once). GFLOP/token: forward with all loops,
attention over half the context. cache: bfloat16, all layers and loops. B/entry: one layer at one loop. full K/V: how
many times larger an entry of full multi-head keys and values (2 * heads * head_dim) would be."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m openmythos", description="Recurrent-Depth Transformers in PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = commands.add_parser("sizes", help="parameters, FLOPs and cache bytes of the named sizes")
    sizes.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(VARIANTS)}")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in VARIANTS]
    if unknown:
        parser.error(f"NAME = {unknown[0]}: must be one of {', '.join(VARIANTS)}")
    print(table({name: VARIANTS[name] for name in args.names or VARIANTS}))
    print(NOTE)


if __name__ == "__main__":
    main()
