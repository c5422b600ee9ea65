"""Tile shapes of the latent attention kernels, per target.

Chosen by reasoning and checked against the compiler's counts of registers, spills and shared memory; those of sm_90 for
16-bit numbers and the heads of mythos_1b (narrow) and mythos_10b (wide) are also measured, on an H200 (docs/mla.md).
`python -m openmythos_kernels tune` measures on the GPU at hand; its choices take precedence.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from openmythos_kernels.runtime import target, tuning


class Config(NamedTuple):
    """A tile of block_m queries and block_n keys; warps of a program; stages of its pipeline of loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class LatentConfig(NamedTuple):
    """The block_h heads, block_n keys and block_r latent channels that a program holds at once."""

    block_h: int
    block_n: int
    block_r: int
    warps: int
    stages: int


_Any = TypeVar("_Any", Config, LatentConfig)


def power(n: int) -> int:
    """The padded width of a tile of n channels: matrix instructions need at least 16."""
    return max(16, 1 << (n - 1).bit_length())


# Registers decide, as a program keeps its accumulators in them, in float32.
#   forward  block_m * v                   and scores of block_m * block_n
#   dq       block_m * (nope + rope)       and two of those
#   dkv      block_n * (nope + rope + v)   and two of those
# "narrow" is nope + rope + v <= 192 after padding (mythos_1b: 64 + 32 + 64), "wide" up to 384 (the larger variants),
# "huge" anything beyond. NVIDIA has no matrix instruction of full float32 precision, and float32 operands are twice as
# large, so their tiles are small.
#
# No loop of sm_90 and sm_100 that may use their asynchronous products (wgmma, tcgen05.mma) has one stage: compiled by
# Triton 3.6, some such kernels access memory outside their shared memory ("out-of-range shared address", seen on an
# H200). Products of float32 have no matrix instruction on NVIDIA.
ASYNCHRONOUS = ("sm_90", "sm_100")
SYNCHRONOUS = ("sm_80", "sm_86", "sm_120")  # their matrix instructions take all operands from registers
# fmt: off
_FLOAT32 = {
    "forward": {"narrow": Config(32, 32, 8, 1), "wide": Config(16, 32, 8, 1), "huge": Config(16, 16, 8, 1)},
    "dq":      {"narrow": Config(32, 32, 8, 1), "wide": Config(16, 16, 8, 1), "huge": Config(16, 16, 8, 1)},
    "dkv":     {"narrow": Config(32, 32, 8, 1), "wide": Config(16, 16, 4, 1), "huge": Config(16, 16, 8, 1)},
}
_FLOAT32_EXCEPTIONS = {  # where the table's configuration spills
    ("dkv", "wide", "sm_80"): Config(16, 16, 8, 1),
    ("forward", "wide", "sm_86"): Config(16, 16, 8, 1),
    ("dkv", "wide", "sm_86"): Config(16, 16, 8, 1),
    ("dkv", "wide", "sm_120"): Config(16, 16, 8, 1),
    ("dkv", "narrow", "gfx942"): Config(16, 32, 8, 1),
}
_HALF = {
    "sm_80": {
        "forward": {"narrow": Config(128, 64, 8, 3), "wide": Config(128, 32, 8, 2), "huge": Config(64, 32, 8, 1)},
        "dq":      {"narrow": Config(64, 32, 4, 2),  "wide": Config(64, 32, 8, 2),  "huge": Config(32, 32, 8, 1)},
        "dkv":     {"narrow": Config(32, 64, 8, 2),  "wide": Config(32, 32, 8, 2),  "huge": Config(16, 16, 8, 1)},
    },
    "sm_90": {
        "forward": {"narrow": Config(128, 64, 8, 3), "wide": Config(128, 64, 8, 3), "huge": Config(64, 32, 8, 2)},
        "dq":      {"narrow": Config(64, 64, 4, 2),  "wide": Config(128, 64, 8, 2), "huge": Config(32, 16, 8, 2)},
        "dkv":     {"narrow": Config(32, 64, 4, 2),  "wide": Config(32, 64, 4, 2),  "huge": Config(16, 16, 8, 2)},
    },
    "sm_100": {
        "forward": {"narrow": Config(128, 64, 8, 3), "wide": Config(128, 64, 8, 3), "huge": Config(64, 32, 8, 2)},
        "dq":      {"narrow": Config(64, 64, 4, 2),  "wide": Config(128, 64, 8, 2), "huge": Config(32, 32, 8, 2)},
        "dkv":     {"narrow": Config(32, 64, 8, 2),  "wide": Config(32, 64, 8, 2),  "huge": Config(16, 16, 8, 2)},
    },
    "gfx942": {
        "forward": {"narrow": Config(128, 64, 8, 2), "wide": Config(128, 32, 8, 2), "huge": Config(32, 32, 4, 1)},
        "dq":      {"narrow": Config(64, 32, 4, 2),  "wide": Config(64, 32, 4, 2),  "huge": Config(32, 32, 4, 1)},
        "dkv":     {"narrow": Config(32, 64, 8, 1),  "wide": Config(32, 64, 4, 1),  "huge": Config(16, 16, 4, 1)},
    },
}
# fmt: on
_HALF["sm_86"] = _HALF["sm_80"]
_HALF["sm_120"] = {  # where those of sm_80 spill
    "forward": _HALF["sm_80"]["forward"],
    "dq": {**_HALF["sm_80"]["dq"], "wide": Config(32, 32, 8, 2)},
    "dkv": {**_HALF["sm_80"]["dkv"], "wide": Config(16, 32, 8, 2)},
}
_PACKED_EXCEPTIONS = {("forward", "narrow", "sm_100"): Config(128, 32, 8, 3)}  # where _HALF's spills for packed rows
KERNELS = tuple(_FLOAT32)


def attention(kernel: str, itemsize: int, nope: int, rope: int, v: int, packed: bool = False) -> Config:
    """The configuration of "forward", "dq" or "dkv" for the current target."""
    if chosen := tuning.chosen(f"mla_attention {kernel} {itemsize} {nope} {rope} {v}"):
        return Config(*chosen)
    kind, name = _kind(nope, rope, v), target.current().name
    if itemsize == 4:
        return _FLOAT32_EXCEPTIONS.get((kernel, kind, name), _FLOAT32[kernel][kind])
    config = _HALF[name][kernel][kind]
    return _PACKED_EXCEPTIONS.get((kernel, kind, name), config) if packed else config


# The backward in one pass keeps what dkv keeps and a tile of block_m * (nope + rope); larger tiles, and wider heads,
# spill. Its programs wait for each other in NVIDIA's assembly. Float32 without matrix instructions has nothing to gain.
_ONCE = {name: Config(32, 64, 4, 2) for name in ("sm_80", "sm_90", "sm_100")}
DELTA_ROWS = 32


def attention_once(itemsize: int, nope: int, rope: int, v: int) -> Config | None:
    """The configuration of the backward in one pass for the current target; None: there is none."""
    if itemsize != 2 or _kind(nope, rope, v) != "narrow":
        return None
    return _ONCE.get(target.current().name)


def _kind(nope: int, rope: int, v: int) -> str:
    width = power(nope) + power(rope) + power(v)
    return "narrow" if width <= 192 else "wide" if width <= 384 else "huge"


def dkv_rope_block(nope: int, rope: int, v: int) -> int:
    """The padded width of the rotary tile in the dkv kernel.

    Without asynchronous products NVIDIA's compiler lays out a rotary tile much narrower than the others (128 + 32
    channels) so that registers spill: padding the tile is cheaper.
    """
    wide = min(power(nope), power(v)) > 64 and target.current().name in SYNCHRONOUS
    return max(power(rope), 64 if wide else 16)


# Attention over latents: a program's part of the result, block_r * block_h in float32, fills the registers, and the
# pipeline holds `stages` tiles of block_n * block_r in shared memory.
# A row: the widest latent, the most heads at once, block_n, warps, stages.
# fmt: off
_LATENT = {
    "sm_80":  ((256, 16, 64, 4, 2), (512, 32, 32, 8, 2), (1024, 16, 32, 8, 2)),
    "sm_90":  ((256, 16, 64, 4, 3), (256, 64, 64, 8, 2), (512, 32, 32, 4, 3), (512, 64, 32, 8, 2),
               (1024, 32, 32, 8, 2)),
    "sm_100": ((256, 64, 32, 8, 2), (512, 64, 32, 8, 2), (1024, 32, 32, 8, 2)),
    "gfx942": ((256, 16, 64, 4, 2), (512, 16, 32, 4, 2), (1024, 16, 16, 4, 2)),
}
_LATENT["sm_86"] = _LATENT["sm_120"] = (*_LATENT["sm_80"][:2], (1024, 16, 16, 8, 2))  # 99 KiB of shared memory
# fmt: on
_LATENT_FLOAT32 = ((256, 16, 16, 8, 1), (512, 16, 16, 8, 1), (1024, 8, 16, 8, 1))
_LATENT_FLOAT32_EXCEPTIONS = {
    "gfx942": ((256, 16, 16, 4, 1), (512, 16, 16, 8, 1)),  # whole tiles of 1024 spill
    "sm_86": _LATENT_FLOAT32[:2],  # and here they exceed the shared memory
    "sm_120": _LATENT_FLOAT32[:2],
}


def latent(itemsize: int, heads: int, r: int) -> LatentConfig:
    """The configuration of attention over latents for the current target.

    All heads in one program read the cache once. Where registers do not allow that, there are as few programs as they
    allow, and as few padded heads as that number of programs allows. A tile has at least 8 heads, on AMD 16.
    """
    if chosen := tuning.chosen(f"mla_attend_latent {itemsize} {heads} {r}"):
        return LatentConfig(*chosen)
    name = target.current().name
    table = _LATENT[name]
    if itemsize == 4:
        table = _LATENT_FLOAT32_EXCEPTIONS.get(name, _LATENT_FLOAT32)
    block_r = power(r) if power(r) <= table[-1][0] else 256
    width = min(row[0] for row in table if block_r <= row[0])
    rows = [row[1:] for row in table if row[0] == width]
    most, block_n, warps, stages = next((row for row in rows if heads <= row[0]), rows[-1])
    if r > block_r:  # in chunks, whose tiles share the memory
        block_n, stages = 16, 1
        if itemsize == 2 and name in ASYNCHRONOUS:
            most, warps, stages = 16, 8, 2
        elif name in ("sm_86", "sm_120"):
            most = 8
    passes = -(-heads // most)
    block_h = 16 if name == "gfx942" else 8
    while -(-heads // block_h) > passes:
        block_h *= 2
    return LatentConfig(block_h, block_n, block_r, warps, stages)


def candidates(kernel: str) -> list[Config]:
    """The configurations that tuning tries: those of all targets' tables for 16-bit tensors."""
    return _allowed({config for table in _HALF.values() for config in table[kernel].values()})


def latent_candidates(heads: int, r: int) -> list[LatentConfig]:
    """The configurations that tuning tries for attention over latents."""
    found = set()
    for target_ in target.TARGETS.values():
        with target.targeting(target_):
            config = latent(2, heads, r)
        halved = config._replace(block_n=max(16, config.block_n // 2))
        found |= {config, halved, config._replace(stages=1), config._replace(stages=3)}
    return _allowed(found)


def _allowed(configs: set[_Any]) -> list[_Any]:
    asynchronous = target.current().name in ASYNCHRONOUS
    return sorted(config for config in configs if not (asynchronous and config.stages == 1))
