"""Tile shapes of the kernels that decode whole layers: chosen by reasoning, and not yet measured on any GPU.

A launch has few rows and reads each weight once, so that only the stream of weights counts. Where a kernel streams as
one of the experts' for few tokens does, it has its tiles.
"""

from __future__ import annotations

import triton

from openmythos_kernels.ops.mla.configs import power
from openmythos_kernels.ops.moe import configs as experts
from openmythos_kernels.runtime import target

ROWS = experts.GEMV  # rows of a tile
SPLITS = 64  # of a row's keys, at most: whoever merges them holds the logarithms of all
MERGED = 16  # splits that are read at a time
SUM_BLOCK = 1024  # columns of a program that sums experts
_CHUNK = 64  # latent channels of a program that makes queries


def linear(itemsize: int) -> experts.Config:
    """Layers of some hundred to some thousand outputs: narrow tiles, or there were too few programs."""
    return experts.experts("gemv_dense_down", itemsize)


def normed_linear(itemsize: int) -> experts.Config:
    """`linear` behind a norm, whose rows and their squares are in registers as well."""
    return linear(itemsize)._replace(k=128, warps=2 if itemsize == 2 else 4)


def up(itemsize: int, dense: bool) -> experts.Config:
    """The experts' first layer, behind a norm: with the warps of the experts' own kernel it spills on sm_90."""
    return normed_linear(itemsize) if dense else experts.experts("up", itemsize, experts.GEMV)._replace(warps=8)


def down(itemsize: int) -> experts.Config:
    return experts.experts("gemv_down", itemsize)


def queries(itemsize: int, r: int, nope: int, rope: int) -> dict:
    """A program's constants. Its product into the latent space holds nope x CHUNK of kv_up."""
    blocks = dict(NOPE_BLOCK=power(nope), PAIR_BLOCK=power(rope // 2), CHUNK=min(_CHUNK, power(r)), R_BLOCK=power(r))
    k, warps = (128, 4) if itemsize == 2 else (32, 8)
    return dict(**blocks, BM=ROWS, BK=k, num_warps=warps, num_stages=2)


def values(r: int, v: int) -> dict:
    """A program's constants: it holds BV x r of kv_up in float32, 32 registers a thread."""
    wide = power(r)
    return dict(R_BLOCK=wide, BV=min(max(1, 4096 // wide), triton.next_power_of_2(v)), SPLITS=SPLITS, BS=MERGED)


def splits(programs: int, capacity: int, block_n: int) -> int:
    """Into how many parts a row's keys are split: enough to keep all multiprocessors busy, if with a tile each. At one
    row there are few programs, and a walk over several tiles takes longer than merging more parts."""
    return max(1, min(target.current().units // programs, triton.cdiv(capacity, block_n), SPLITS))


def overlap() -> dict:
    """Constants and options of a launch that overlaps with the one before it, which GPUs can from sm_90 on."""
    name = target.current().name
    if name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90:
        return dict(OVERLAP=True, launch_pdl=True)
    return dict(OVERLAP=False)


def row(D: int) -> dict:
    """A program's constants where it holds a whole row, 8 elements a thread and up to 32 in the widest."""
    block = max(16, triton.next_power_of_2(D))
    return dict(BLOCK=block, num_warps=max(1, min(16, block // (8 * target.current().warp))))
