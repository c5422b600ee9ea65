"""Weights in pages of 2 MiB: on a CPU a token costs the time of reading them, and every page costs a TLB look-up."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_HUGE = 2 << 20
_MAPS = Path("/proc/self/maps")
_TRIES = 3  # a page just written may not be in the system's lists yet
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, Linux 6.1 and later: now, not when the system has time


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Moves the memory of these tensors into huge pages, which the system copies once. Addresses and values stay.

    Skips tensors that are not dense CPU tensors and those in shared or mapped files. After `.to()`, call
    `use_huge_pages` again: the parameters have other memory.

    Returns:
        The bytes now in huge pages, with those that share a page with the tensors; 0 if the system is not Linux, has no
        huge pages, or is older than Linux 6.1 (which may follow the hint later).
    """
    if not _available():
        return 0
    libc = ctypes.CDLL(None)
    settled = 0
    for begin, end in _within(_spans(tensors), _mapped()):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _HUGEPAGE)
        for page in range(begin, end, _HUGE):
            done = any(
                libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(_HUGE), _COLLAPSE) == 0 for _ in range(_TRIES)
            )
            settled += _HUGE * done
    return settled


def _available() -> bool:
    if sys.platform != "linux":
        return False
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


Spans = list[tuple[int, int]]


def _spans(tensors: Iterable[Tensor]) -> Spans:
    """The whole huge pages around the tensors' memory, in order; small tensors may share a page."""
    storages = (t.untyped_storage() for t in tensors if _has_memory(t))
    return _merged((s.data_ptr() // _HUGE * _HUGE, -(-(s.data_ptr() + s.nbytes()) // _HUGE) * _HUGE) for s in storages)


def _has_memory(t: Tensor) -> bool:
    return type(t.data) is Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.numel() > 0


def _mapped() -> Spans:
    """This process's private anonymous memory, as the system maps it."""
    try:
        text = _MAPS.read_bytes()  # bytes, as names of files may hold any character but a newline
    except OSError:  # no /proc
        return []
    return _merged(
        tuple(int(x, 16) for x in fields[0].split(b"-"))
        for fields in map(bytes.split, text.split(b"\n"))
        if fields and fields[1] == b"rw-p" and fields[4] == b"0"
    )


def _within(spans: Spans, mapped: Spans) -> Spans:
    """The whole huge pages inside both the spans and the mapped memory."""
    both = ((max(a, c), min(b, d)) for a, b in spans for c, d in mapped)
    return [(-(-a // _HUGE) * _HUGE, b // _HUGE * _HUGE) for a, b in both if -(-a // _HUGE) < b // _HUGE]


def _merged(spans: Iterable[tuple[int, ...]]) -> Spans:
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
