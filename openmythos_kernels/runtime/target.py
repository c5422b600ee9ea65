"""The GPU that Triton kernels are configured for: the one at hand, or one to compile for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """Limits of one GPU architecture, as its vendor documents them.

    Attributes:
        name: "sm_80", "gfx942".
        warp: threads in a warp (wavefront).
        shared_memory: bytes that one block may use.
        shared_memory_per_unit, registers_per_unit, warps_per_unit, blocks_per_unit: limits of a multiprocessor (compute
            unit), from which occupancy follows.
        units: multiprocessors of the usual product.
    """

    name: str
    warp: int
    shared_memory: int
    shared_memory_per_unit: int
    registers_per_unit: int
    warps_per_unit: int
    blocks_per_unit: int
    units: int


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 32, 163 << 10, 164 << 10, 65536, 64, 32, 108),
        Target("sm_90", 32, 227 << 10, 228 << 10, 65536, 64, 32, 132),
        Target("sm_100", 32, 227 << 10, 228 << 10, 65536, 64, 32, 148),
        Target("gfx942", 64, 64 << 10, 64 << 10, 131072, 32, 16, 304),
    )
}
_wanted: ContextVar[Target | None] = ContextVar("target", default=None)


def current() -> Target:
    """The target that launches are configured for: the one set by `targeting`, else the GPU at hand.

    An architecture that is not listed takes the next lower one; without a GPU (interpreter) it is sm_80.
    """
    wanted = _wanted.get()
    if wanted is not None:
        return wanted
    if not torch.cuda.is_available():
        return TARGETS["sm_80"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, _ = torch.cuda.get_device_capability()
    return TARGETS["sm_100" if major >= 10 and major != 12 else "sm_90" if major == 9 else "sm_80"]


def overridden() -> bool:
    """True inside `targeting`."""
    return _wanted.get() is not None


@contextlib.contextmanager
def targeting(target: Target) -> Iterator[None]:
    """Within the context, launches are configured for `target`, whatever GPU there is."""
    token = _wanted.set(target)
    try:
        yield
    finally:
        _wanted.reset(token)
