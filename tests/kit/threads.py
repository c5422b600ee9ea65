"""The number of threads that PyTorch computes with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch computes with `number` threads within, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_each_number(numbers: Iterable[int], call: Callable[[], T]) -> list[T]:
    """The results of `call`, computed with each number of threads."""
    results = []
    for number in numbers:
        with threads(number):
            results.append(call())
    return results
