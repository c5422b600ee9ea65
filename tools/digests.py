"""Writes openmythos_kernels/upstream/accepted.json: digests of the open_mythos classes that fast modules may replace.

    python -m tools.digests 0.5.0=path/to/main.py head-8c68c1f=path/to/main.py

List only versions whose classes compute what `openmythos` computes, as tests/conformance checks. A digest that several
versions share is filed under the first one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from openmythos_kernels.upstream.digest import class_digests

TABLE = Path(__file__).parents[1] / "openmythos_kernels" / "upstream" / "accepted.json"
CLASSES = (
    "ACTHalting",
    "Expert",
    "GQAttention",
    "LTIInjection",
    "LoRAAdapter",
    "MLAttention",
    "MoEFFN",
    "OpenMythos",
    "RMSNorm",
    "RecurrentBlock",
    "TransformerBlock",
)


def table(versions: dict[str, str]) -> dict[str, dict[str, str]]:
    """Class -> digest -> version, from version -> source text."""
    found: dict[str, dict[str, str]] = {name: {} for name in CLASSES}
    for version, source in versions.items():
        digests = class_digests(source)
        for name in CLASSES:
            found[name].setdefault(digests[name], version)
    return found


def main(arguments: Sequence[str]) -> int:
    if not arguments or not all("=" in argument for argument in arguments):
        print(__doc__)
        return 2
    versions = {version: Path(path).read_text() for version, path in (a.split("=", 1) for a in arguments)}
    TABLE.write_text(json.dumps(table(versions), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
