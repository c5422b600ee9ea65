"""Tile shapes of the latent attention kernels, per target.

Chosen by reasoning (nothing here is measured), then held against the compiler's own count of registers, spills and
shared memory. See docs/mla.md, "Configurations". `python -m openmythos_kernels tune` measures alternatives on a GPU
at hand and its choice goes before these.
"""

from __future__ import annotations

from typing import NamedTuple

from openmythos_kernels.runtime import target


class Config(NamedTuple):
    """block_m: queries, block_n: keys of a tile. warps: of a program. stages: depth of the pipeline of loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def power(n: int) -> int:
    """The padded width of a tile of n channels: matrix instructions want 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


# Registers decide: a program keeps its accumulators in them, in float32.
#   forward  block_m * v                   one walk over keys
#   dq       block_m * (nope + rope)
#   dkv      block_n * (nope + rope + v)
# "narrow" is nope + rope + v <= 192 after padding (mythos_1b: 64 + 32 + 64), "wide" up to 384 (all larger variants),
# "huge" anything beyond. Full precision products have no matrix instruction on NVIDIA, and operands of twice the size.
_NARROW, _WIDE, _HUGE = "narrow", "wide", "huge"
_TABLE = {
    "sm_80": {
        ("forward", 2): {_NARROW: Config(128, 64, 4, 3), _WIDE: Config(128, 64, 8, 2), _HUGE: Config(64, 32, 8, 1)},
        ("dq", 2): {_NARROW: Config(64, 64, 4, 2), _WIDE: Config(64, 32, 4, 2), _HUGE: Config(32, 32, 8, 1)},
        ("dkv", 2): {_NARROW: Config(64, 64, 4, 2), _WIDE: Config(32, 64, 8, 2), _HUGE: Config(32, 32, 8, 1)},
        ("forward", 4): {_NARROW: Config(32, 32, 4, 1), _WIDE: Config(32, 32, 8, 1), _HUGE: Config(16, 16, 8, 1)},
        ("dq", 4): {_NARROW: Config(32, 32, 4, 1), _WIDE: Config(32, 32, 8, 1), _HUGE: Config(16, 16, 8, 1)},
        ("dkv", 4): {_NARROW: Config(32, 32, 4, 1), _WIDE: Config(32, 32, 8, 1), _HUGE: Config(16, 16, 8, 1)},
    },
}
_TABLE["sm_90"] = _TABLE["sm_80"]
_TABLE["sm_100"] = _TABLE["sm_80"]
_TABLE["gfx942"] = _TABLE["sm_80"]


def attention(kernel: str, itemsize: int, nope: int, rope: int, v: int) -> Config:
    """The configuration of "forward", "dq" or "dkv" for the current target."""
    width = power(nope) + power(rope) + power(v)
    kind = _NARROW if width <= 192 else _WIDE if width <= 384 else _HUGE
    return _TABLE[target.current().name][kernel, itemsize][kind]


class LatentConfig(NamedTuple):
    """block_h: heads, block_n: keys, block_r: channels of the latent that a program holds at once."""

    block_h: int
    block_n: int
    block_r: int
    warps: int
    stages: int


def latent(itemsize: int, heads: int, r: int) -> LatentConfig:
    """The configuration of attention over latents for the current target."""
    block_r = power(r)
    return LatentConfig(16 if heads > 8 else 8, 32, block_r, 4, 2)
