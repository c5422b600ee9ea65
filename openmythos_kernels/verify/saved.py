"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of all memory that the graph of `call`'s result holds on to, each counted once, the weights' left out."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # held until all is counted: memory that is freed may be given out again
    del result
    return sum(kept.values())
