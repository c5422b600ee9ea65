"""Sizes at which one way becomes better than another: one row each, with what measured it.

Thresholds inside an op (tiles, tokens per expert) are its configurations: `ops/*/configs.py`, and constants at the top
of the files of csrc/cpu.
"""

from __future__ import annotations

from typing import NamedTuple


class Threshold(NamedTuple):
    """A number, what it counts, what it decides and the command whose figures it comes from."""

    value: float
    unit: str
    decides: str
    measured_by: str


# Read through this table at every call, so that a test or a user may set a row.
THRESHOLDS = {
    "mla_recompute": Threshold(
        8 << 20,
        "bytes of a call's queries, keys, values and output",
        "from here on training keeps only the latents and computes the others again in the backward",
        "python -m benchmarks --only model (its row with recompute off)",
    ),
    "moe_weights_once": Threshold(
        0,
        "bytes of rows that a layer's backward keeps",
        "up to here a GPU makes the gradients of routed weights by one product for all loops; beyond, each loop adds",
        "python -m tools.gpu_check (not run yet with it, so it is off)",
    ),
    "moe_weights_once_cpu": Threshold(
        256 << 20,
        "bytes of rows that a layer's backward keeps",
        "up to here a CPU makes the gradients of routed weights by one product for all loops of few tokens",
        "chosen, not swept: it bounds the memory",
    ),
    "moe_few_tokens": Threshold(
        128,
        "tokens of a loop",
        "up to here a CPU's loop keeps its rows for that product; with more, adding its own is as fast",
        "python -m benchmarks --only moe (its row of 16 loops of 64 tokens); here the gemv path ends (docs/moe.md)",
    ),
    "early_exit_share": Threshold(
        1 / 16,
        "share of the positions that are computed",
        "sequences and positions leave the batch once they are so many: fewer are not worth a copy of the others",
        "python -m benchmarks --only loop (its trimming row; the share was chosen, not swept)",
    ),
    "early_exit_lag": Threshold(
        0, "loops", "how many loops late the host reads the running count where it need not wait", "by definition"
    ),
    "early_exit_lag_cuda": Threshold(
        2, "loops", "how many loops late the host reads the running count of a GPU", "python -m tools.gpu_check"
    ),
}


def threshold(name: str) -> float:
    """The value of a row."""
    return THRESHOLDS[name].value
