"""Tile shapes of the loop step's kernels: by the width of a row and the size of an element, for every target."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from openmythos_kernels.runtime.target import current

# Bytes of the widest row that a backward program holds: ten arrays of that length must fit the registers.
WIDEST = 8192
# Bytes of the widest row whose e the forward keeps in registers beside h'; of a wider row it reads e again.
WIDEST_KEPT = 32768
# Columns of the widest row that a program of `step_early.py` holds beside the next one: at 4096 the backward spills.
WIDEST_EARLY = 2048
SUMS_BLOCK, DOTS_BLOCK = 128, 1024  # columns of a program of the kernels of that name


@dataclass(frozen=True)
class Config:
    rows: int  # rows a program handles together
    block: int  # columns it handles together, a power of two
    warps: int


def forward(D: int, itemsize: int) -> Config:
    """Whole rows, 16 elements a thread; several rows a program where rows are short."""
    block = max(triton.next_power_of_2(D), 16)
    rows = max(1, min(16, 2048 // block))
    # 1024 threads leave too few registers to each for the widest rows of two-byte numbers.
    return Config(rows, block, warps(rows * block, 32 if block > 8192 and itemsize == 2 else 16))


def backward(D: int, itemsize: int) -> Config:
    """Whole rows up to WIDEST, tiles of 1024 columns beyond; 8 elements a thread, 16 in the widest rows."""
    block = max(triton.next_power_of_2(D), 16)
    block = block if block * itemsize <= WIDEST else 1024
    rows = max(1, min(16, 1024 // block))
    return Config(rows, block, warps(rows * block, 16 if block > 2048 else 8))


def early(D: int, each: int) -> Config:
    """Whole rows, `each` elements a thread: of the kernels that load rows early."""
    block = max(triton.next_power_of_2(D), 16)
    rows = max(1, min(16, 1024 // block))
    return Config(rows, block, warps(rows * block, each))


def warps(elements: int, each: int) -> int:
    """The warps for so many elements, `each` a thread; at most 1024 threads."""
    warp = current().warp
    return max(1, min(1024 // warp, elements // (each * warp)))
