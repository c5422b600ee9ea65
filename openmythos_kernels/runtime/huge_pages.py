"""Weights in pages of 2 MiB: what a token costs on a CPU is reading them, and the processor looks up every page it
reads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_HUGE = 2 << 20
_MAPS = Path("/proc/self/maps")
_TRIES = 3  # a page that was just written may still be on its way to the system's lists
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, Linux 6.1 and later: now, not when the system has time


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Puts the memory of these tensors into huge pages: the system copies it once. Addresses and values stay.

    Tensors that are not dense CPU tensors, or lie in shared or mapped files, are passed over. Memory that the same
    parameters get later, as from `module.to(dtype)`, has to be named again.

    Returns:
        Bytes in huge pages now, what shares a page with the tensors included; 0 where the system is not Linux, has no
        huge pages, or is older than 6.1 (it may then follow the hint in its own time).
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
    """Whole huge pages around the tensors' memory, in order; small neighbours share one."""
    storages = (t.untyped_storage() for t in tensors if _has_memory(t))
    return _merged((s.data_ptr() // _HUGE * _HUGE, -(-(s.data_ptr() + s.nbytes()) // _HUGE) * _HUGE) for s in storages)


def _has_memory(t: Tensor) -> bool:
    return type(t.data) is Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.numel() > 0


def _mapped() -> Spans:
    """This process's private memory that no file stands behind, as the system has it in pieces."""
    try:
        text = _MAPS.read_bytes()  # names of files are bytes, with any character but the one that ends a line
    except OSError:  # no /proc here
        return []
    return _merged(
        tuple(int(x, 16) for x in fields[0].split(b"-"))
        for fields in map(bytes.split, text.split(b"\n"))
        if fields and fields[1] == b"rw-p" and fields[4] == b"0"
    )


def _within(spans: Spans, mapped: Spans) -> Spans:
    """The whole huge pages of the spans that lie in what is mapped."""
    both = ((max(a, c), min(b, d)) for a, b in spans for c, d in mapped)
    return [(-(-a // _HUGE) * _HUGE, b // _HUGE * _HUGE) for a, b in both if -(-a // _HUGE) < b // _HUGE]


def _merged(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
