"""Parameters, FLOPs and cache bytes of the named sizes."""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.commands.parsing import asks_help
from openmythos.sizes import table
from openmythos.variants import VARIANTS

NOTE = """
active: parameters that one token uses (K of E experts, looped blocks once). GFLOP/token: forward with all loops,
attention over half the context. cache: bfloat16, all layers and loops. B/entry: one layer at one loop. full K/V: how
many times larger an entry of full multi-head keys and values (2 * heads * head_dim) would be."""


def main(arguments: Sequence[str]) -> None:
    """`openmythos sizes [NAME ...]`"""
    if asks_help(arguments):
        print(f"usage: openmythos sizes [NAME ...]\n\nNAME: default all of {', '.join(VARIANTS)}")
        return
    for name in arguments:
        if name not in VARIANTS:
            raise ValueError(f"NAME = {name}: must be one of {', '.join(VARIANTS)}")
    print(table({name: VARIANTS[name] for name in arguments or VARIANTS}))
    print(NOTE)
