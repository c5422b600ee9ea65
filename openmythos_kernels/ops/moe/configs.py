"""Tile shapes of the expert kernels, per target.

Chosen by reasoning and checked against the compiler's counts of registers, spills and shared memory; those of sm_90 for
16-bit numbers are also measured, on an H200 (docs/moe.md, "Configurations").
"""

from __future__ import annotations

from typing import NamedTuple

from openmythos_kernels.runtime import target

LIBRARY = 128  # tokens up to which shared experts run in our kernels; beyond, in the library's products
GEMV = 16  # tokens up to which the chosen experts' weights are streamed without a sort


class Config(NamedTuple):
    """A program's tile: m x n of the result, k of the sum a step; its warps; stages of loads in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def constants(self) -> dict:
        return dict(BM=self.m, BN=self.n, BK=self.k, num_warps=self.warps, num_stages=self.stages)


def rows(itemsize: int, average: float) -> int:
    """Rows of a tile for experts of `average` rows each: few enough that most of a tile is used."""
    most = 128 if itemsize == 2 else 64
    for block in (16, 32, 64):
        if average <= 1.5 * block:
            return block
    return most


# "gate_up": two accumulators, so tiles half as wide. "one": one accumulator. "activation": one, but the epilogue also
# holds gate, up and their gradients. "two products": one accumulator that sums two products.
# Weights' gradients (up_weights, down_weights): a program owns m x n of a matrix and steps over k rows.
# Accumulators decide: m * n * (2 for gate_up) / (32 * warps) float32 registers a thread, 64 to 128 of them. NVIDIA has
# no matrix instruction of full float32 precision: smaller tiles, whose operands live in registers too.
_HALF = {
    ("gate_up", 16): Config(16, 64, 128, 4, 3),
    ("gate_up", 32): Config(32, 64, 64, 4, 3),
    ("gate_up", 64): Config(64, 64, 64, 4, 3),
    ("gate_up", 128): Config(128, 64, 64, 8, 3),
    ("one", 16): Config(16, 64, 64, 4, 3),
    ("one", 32): Config(32, 64, 64, 4, 3),
    ("one", 64): Config(64, 128, 64, 4, 3),
    ("one", 128): Config(128, 128, 64, 8, 3),
    ("activation", 16): Config(16, 64, 64, 4, 3),
    ("activation", 32): Config(32, 64, 64, 4, 3),
    ("activation", 64): Config(64, 64, 64, 4, 3),
    ("activation", 128): Config(128, 32, 64, 8, 3),
    ("two products", 16): Config(16, 64, 64, 4, 3),
    ("two products", 32): Config(32, 64, 64, 4, 3),
    ("two products", 64): Config(64, 128, 32, 4, 3),
    ("two products", 128): Config(128, 128, 32, 8, 3),
    "up_weights": Config(64, 64, 64, 4, 3),
    "down_weights": Config(128, 64, 64, 4, 3),
    # Few tokens: only the stream of weights counts, which needs many bytes in flight in many programs. The one wide
    # shared expert has few columns for its many weights.
    "gemv_down": Config(16, 64, 256, 4, 3),
    "gemv_dense_down": Config(16, 16, 256, 2, 4),
}
_SINGLE = {
    ("gate_up", 16): Config(16, 32, 32, 4, 2),
    ("gate_up", 32): Config(32, 32, 32, 4, 2),
    ("gate_up", 64): Config(64, 32, 16, 8, 2),
    ("one", 16): Config(16, 64, 32, 4, 2),
    ("one", 32): Config(32, 64, 32, 4, 2),
    ("one", 64): Config(64, 64, 32, 8, 2),
    ("activation", 16): Config(16, 32, 32, 4, 2),
    ("activation", 32): Config(32, 32, 32, 4, 2),
    ("activation", 64): Config(64, 32, 32, 8, 2),
    ("two products", 16): Config(16, 64, 32, 4, 2),
    ("two products", 32): Config(32, 64, 32, 4, 2),
    ("two products", 64): Config(64, 32, 16, 8, 2),
    "up_weights": Config(32, 32, 32, 4, 2),
    "down_weights": Config(64, 32, 32, 4, 2),
    "gemv_down": Config(16, 64, 32, 4, 2),
    "gemv_dense_down": Config(16, 16, 128, 4, 2),
}
# Measured at mythos_1b's sizes.
_HOPPER = _HALF | {
    ("one", 16): Config(16, 64, 128, 4, 4),
    ("one", 128): Config(128, 256, 64, 8, 3),
    ("activation", 64): Config(64, 64, 64, 8, 3),
    ("activation", 128): Config(128, 64, 64, 8, 4),
    ("two products", 128): Config(128, 256, 32, 8, 3),
    "up_weights": Config(64, 128, 64, 4, 3),
    "down_weights": Config(128, 128, 64, 4, 3),
}
# An MI300's compute unit has 64 KiB of shared memory: one tile in flight.
_SMALL = {kind: config._replace(stages=2 if config.m * config.k < 8192 else 1) for kind, config in _HALF.items()}
_TABLE = {
    # With longer steps some of the wider models spill a few bytes.
    "sm_80": {
        2: _HALF | {("gate_up", 128): Config(128, 64, 32, 8, 3), "down_weights": Config(128, 64, 32, 4, 3)},
        4: _SINGLE | {("activation", 64): Config(64, 32, 16, 8, 2)},  # Triton 3.6 spills with more
    },
    "sm_90": {2: _HOPPER, 4: _SINGLE},
    "sm_100": {
        2: _HALF | {"up_weights": Config(64, 64, 64, 8, 3)},  # four warps spill where ADD is set
        4: _SINGLE
        | {
            ("gate_up", 64): Config(64, 32, 16, 8, 1),
            ("two products", 16): Config(16, 64, 32, 4, 1),
        },  # two stages spill
    },
    "gfx942": {2: _SMALL, 4: _SINGLE},
}
_TABLE["sm_86"] = _TABLE["sm_120"] = _TABLE["sm_80"]
# kernel -> the kind of its accumulators
_KINDS = {"up": "gate_up", "down": "one", "down_backward": "activation", "up_backward": "two products"}


def experts(kernel: str, itemsize: int, block: int = 0) -> Config:
    """The configuration of an expert kernel. block: from `rows(...)`, unused for kernels that have an entry of their
    own."""
    table = _TABLE[target.current().name][itemsize]
    return table[(_KINDS[kernel], block) if kernel in _KINDS else kernel]
