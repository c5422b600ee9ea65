"""Loads the CUDA kernels of csrc/cuda into this process, once; sets the order of threads; counts bytes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from openmythos_kernels.runtime import backends, extension
from tests.cuda_on_cpu import build

ORDERS = {"forward": 0, "reverse": 1, "random": 2}


@dataclass(frozen=True)
class Bytes:
    """Bytes that kernels moved: loaded and stored of tensors with a row per position, and loaded of parameters, which
    come from a cache after the first time."""

    loaded: int
    stored: int
    parameters: int


class Device:
    """The only CUDA device. CUDA_ON_CPU_MODE names its build mode to worker processes."""

    def __init__(self, mode: str = "plain", edit=None):
        self.library = ctypes.CDLL(str(build.kernels(build.KERNELS, mode, edit)), mode=ctypes.RTLD_GLOBAL)
        self.library.cuda_on_cpu_counted.restype = ctypes.c_uint64
        self.library.cuda_on_cpu_set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        torch.ops.load_library(str(build.bindings()))

    @contextlib.contextmanager
    def order(self, name: str, seed: int = 0) -> Iterator[None]:
        self.library.cuda_on_cpu_set_order(ORDERS[name], seed)
        try:
            yield
        finally:
            self.library.cuda_on_cpu_set_order(ORDERS["forward"], 0)

    @contextlib.contextmanager
    def counting(self) -> Iterator[list]:
        """Yields a list that gets one Bytes on exit."""
        counted = []
        self.library.cuda_on_cpu_reset_counts()
        yield counted
        counted.append(Bytes(*(self.library.cuda_on_cpu_counted(i) for i in range(3))))


_device = None


def loaded() -> bool:
    """Whether this process has loaded the kernels."""
    return _device is not None


def missing() -> str:
    """Why the kernels cannot run here, or ""."""
    if extension.cuda_architectures(extension.module):
        return "the extension has real CUDA kernels, which these would replace"
    return build.missing()


def device() -> Device:
    """The device, loaded at the first call."""
    global _device
    if _device is None:
        _device = Device(os.environ.get("CUDA_ON_CPU_MODE", "plain"))
    return _device


def run(function, *args, **kwargs):
    """The function's result with the CUDA implementations of all ops, on CPU tensors."""
    device()
    with backends.forcing("cuda"):
        return function(*args, **kwargs)
