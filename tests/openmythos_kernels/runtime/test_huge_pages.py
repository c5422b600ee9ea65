"""Weights in huge pages, by the system's account; nothing else about the weights changes."""

import mmap
import os
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from openmythos_kernels import accelerate, use_huge_pages
from openmythos_kernels.runtime import huge_pages

HUGE = 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def why_not() -> str:
    if sys.platform != "linux" or not SETTING.exists() or "[never]" in SETTING.read_text():
        return "this system has no huge pages"
    release = tuple(int(x) for x in re.findall(r"\d+", platform.release())[:2])
    return "" if release >= (6, 1) else "this system makes huge pages in its own time"


needs_huge_pages = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def in_huge_pages(t: torch.Tensor) -> int:
    """The bytes in huge pages of the mappings that hold the tensor, by the system's account."""
    first, last = t.data_ptr(), t.data_ptr() + t.nbytes
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            counts = int(span[1], 16) < last and first < int(span[2], 16)
        elif counts and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@needs_huge_pages
def test_a_large_tensor():
    t = torch.arange(8 << 20, dtype=torch.float32)  # 32 MiB
    address, copy = t.data_ptr(), t.tolist()[::4096]
    settled = use_huge_pages([t])
    assert settled >= t.nbytes / 2  # the system may run out of free huge pages
    assert in_huge_pages(t) >= t.nbytes / 2
    assert t.data_ptr() == address and t.tolist()[::4096] == copy


@needs_huge_pages
def test_many_small_tensors_share_them():
    many = [torch.full((128 << 10,), float(i)) for i in range(32)]  # 512 KiB each
    assert use_huge_pages(many) >= HUGE
    assert all(t.eq(i).all() for i, t in enumerate(many))


@needs_huge_pages
def test_accelerate_does_it():
    weight = accelerate(nn.Linear(2048, 2048)).weight
    assert in_huge_pages(weight) >= weight.nbytes / 2


def test_what_has_no_memory_of_its_own_is_passed_over():
    given = [torch.empty(4, device="meta"), torch.empty(0), torch.eye(3).to_sparse(), nn.Parameter(torch.ones(3))]
    assert use_huge_pages(given) >= 0
    assert given[3].tolist() == [1.0] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux lists memory")
@pytest.mark.parametrize("name", [b"caf\xe9", "\x85 \u2028\x0c rw-p".encode(), b"\r\rx", b" 1 2 3"])
def test_files_of_any_name_may_be_mapped(name, tmp_path):
    """A file's name is bytes: maybe not text, and maybe with characters that split lines of text."""
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb+") as file:
        file.write(bytes(4096))
        file.flush()
        with mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE):
            assert huge_pages._mapped()
            accelerate(nn.Linear(2, 2))


def test_a_system_that_lists_no_memory_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    assert use_huge_pages([torch.ones(8 << 20)]) == 0


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_a_system_without_them_is_left_alone(setting, monkeypatch, tmp_path):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(huge_pages, "Path", lambda name: path)
    assert use_huge_pages([torch.ones(8 << 20)]) == 0
