"""How kernels find the weights of many experts: the address of the first, and the distance of each one from it.

Any list of equally shaped matrices will do, be they views of one stacked tensor or separate parameters. Nothing is
packed or copied, so nothing can go stale. Only the table of distances stays on the device between calls, and its key is
its contents: weights that moved have other distances and so another table. Reading the addresses costs the host about
50 ns a matrix and call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmythos.compat import capturing
from openmythos_kernels.ops.dtypes import check_for_triton

_KEPT = 1024  # tables; the least recently used goes first
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_distances: OrderedDict[tuple, tuple[int, ...]] = OrderedDict()  # by lists of addresses whose matrices were checked
_captured: dict[tuple, Tensor] = {}  # never freed, as CUDA graphs read them at every replay


class Matrices(NamedTuple):
    """base: the first matrix. offsets: (E,) int64, the elements from its beginning to that of each matrix. aligned: all
    offsets are multiples of 16."""

    base: Tensor
    offsets: Tensor
    aligned: bool


def matrices(
    name: str, weights: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Matrices:
    """The table of a list of contiguous matrices of one shape and dtype.

    The list must be alive while kernels that use the table are being launched.

    Args:
        name: the list's, for errors. shape, dtype, device: of each matrix. They are checked when a list of addresses is
            new: checking hundreds of matrices at every call takes longer than the kernels.

    Raises:
        ValueError: naming a matrix that differs.
    """
    base = weights[0]
    addresses = tuple([w.data_ptr() for w in weights])
    key = (addresses, shape, dtype, device)
    distances = _distances.get(key)
    if distances is None or base.shape != shape or base.dtype != dtype:
        for i, w in enumerate(weights):
            if w.shape != shape or w.dtype != dtype or w.device != device:
                raise ValueError(
                    f"{name}[{i}] must be {tuple(shape)} {dtype} on {device}, "
                    f"got {tuple(w.shape)} {w.dtype} on {w.device}"
                )
        distances = tuple([(address - addresses[0]) // base.element_size() for address in addresses])
        _distances[key] = distances
        if len(_distances) > _KEPT:
            _distances.popitem(last=False)
    return Matrices(base, table(distances, device), all(distance % 16 == 0 for distance in distances))


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers on the device, int64; kept, so that equal numbers are not copied again.

    Raises:
        RuntimeError: a graph is being captured and the numbers are new.
    """
    key = (numbers, device)
    captures = capturing(device)
    found = _captured.get(key)
    if found is None:
        found = _tables.get(key)
        if found is None:
            if captures:
                raise RuntimeError("these weights were never used before this graph capture: call once before it")
            found = _tables[key] = _to_device(numbers, device)
            if len(_tables) > _KEPT:
                _tables.popitem(last=False)
        else:
            _tables.move_to_end(key)
        if captures:
            _captured[key] = found
    return found


def _to_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    found = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return found.to(device, non_blocking=True)


class Experts:
    """The weights of E equal experts in the kernels' form, checked.

    Raises:
        ValueError: a shape or dtype that does not fit x.
    """

    def __init__(self, name: str, x: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]):
        check_for_triton("x", x)
        self.E, self.D, self.I, self.aligned = len(gate), x.shape[1], 0, True
        if not self.E:
            return
        self.I, self.dtype = gate[0].shape[0], gate[0].dtype
        if self.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}_gate[0]: got {self.dtype} {tuple(gate[0].shape)}, must be {x.dtype} or float32")
        tables, self.matrices = [], []  # of gate, up, down; `matrices` owns the copies of strided ones
        for part, weights in (("gate", gate), ("up", up), ("down", down)):
            shape = torch.Size((self.D, self.I) if part == "down" else (self.I, self.D))
            dense = [w if w.is_contiguous() else w.contiguous() for w in weights]
            self.matrices.append(dense)
            tables.append(matrices(f"{name}_{part}", dense, shape, self.dtype, x.device))
        self.aligned = all(part.aligned for part in tables)
        self.gate, self.up, self.down = ((part.base, part.offsets) for part in tables)
