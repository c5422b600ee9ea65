"""The GPU that Triton kernels are configured for: the one at hand, or one to compile for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """Limits of one GPU architecture, as its vendor documents them.

    Attributes:
        name: "sm_80", "gfx942". sm_86 stands for sm_89 as well: the two differ in the blocks of a multiprocessor alone.
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
        Target("sm_86", 32, 99 << 10, 100 << 10, 65536, 48, 16, 84),
        Target("sm_90", 32, 227 << 10, 228 << 10, 65536, 64, 32, 132),
        Target("sm_100", 32, 227 << 10, 228 << 10, 65536, 64, 32, 148),
        Target("sm_120", 32, 99 << 10, 100 << 10, 65536, 48, 24, 170),
        Target("gfx942", 64, 64 << 10, 64 << 10, 131072, 32, 16, 304),
    )
}
_wanted: ContextVar[Target | None] = ContextVar("target", default=None)


def current() -> Target:
    """The target that launches are configured for: the one set by `targeting`, else the GPU at hand.

    An architecture that is not listed takes the next lower one, or sm_80; without a GPU (interpreter) it is sm_80.
    """
    wanted = _wanted.get()
    if wanted is not None:
        return wanted
    if not torch.cuda.is_available():
        return TARGETS["sm_80"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    return _of_capability(*torch.cuda.get_device_capability())


@functools.cache
def _of_capability(major: int, minor: int) -> Target:
    known = {int(name.removeprefix("sm_")): target for name, target in TARGETS.items() if target.warp == 32}
    return known[max((number for number in known if number <= 10 * major + minor), default=80)]


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
