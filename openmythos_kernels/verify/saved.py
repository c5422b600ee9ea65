"""The memory that a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of the memory that the graph of `call`'s result keeps, each storage counted once, without the weights'."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # kept until all is counted, as freed memory may be reused
    del result
    return sum(kept.values())
