"""Tile shapes of the norm's kernels, for every target."""

from __future__ import annotations

import triton

from openmythos_kernels.runtime import target

WIDEST = 32768  # bytes of a row that one program of the backward can hold; wider rows are left to the library
WIDEST_FUSED = 8192  # elements of a row up to which the backward adds the sum's gradient; wider rows would spill


def constants(D: int) -> dict:
    """One program holds a row of D elements: 16 elements a thread, 32 in the widest rows."""
    block, warp = triton.next_power_of_2(D), target.current().warp
    each = 32 if block > 8192 else 16
    return dict(BLOCK=block, num_warps=max(1, min(1024 // warp, block // (each * warp))))
