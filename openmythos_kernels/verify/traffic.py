"""The memory traffic of Triton kernels in Triton's interpreter: every access is checked, every byte counted.

    with traffic() as launches:
        op(cpu_tensors)  # under TRITON_INTERPRET=1 and `backends.forcing("triton")`
    launches[-1].loaded["h"]  # bytes

Each tensor argument of a launch gets its own addresses, 2**40 bytes apart, which become real ones at each load and
store. So an access before an argument's first element or after its last is found wherever it would have gone, and each
byte counts for the argument through which it was reached. Programs of a launch run in no particular order on a GPU, so
it is also an error if one touches what another writes, except by atomics, or behind one: what a program does after an
atomic access that acquires a place comes after all that others did before they released it. That holds for programs
that wait, so they ask for "acquire" and "release"; the default, both at once, is a count, which orders nothing.

A kernel may step from one tensor of an op's list argument to another, as expert weights are found by their distance.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from openmythos_kernels.ops.op import Op

_SHIFT = 40
_MIDDLE = 1 << (_SHIFT - 1)  # an argument's memory begins here, so that accesses before it have its addresses, too
_TRACKED = 1 << 26  # bytes of the largest memory watched for races, as the record is 8 times its size


class AccessError(Exception):
    """A kernel accesses memory outside its arguments, or memory that another of its programs writes."""


@dataclass
class Launch:
    """One launch of a kernel: the bytes it moved by name of the argument, and the `sizes` of whole tensors."""

    kernel: str
    sizes: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def bytes_loaded(self) -> int:
        return sum(self.loaded.values())

    @property
    def bytes_stored(self) -> int:
        return sum(self.stored.values())


_open: list[list[Launch]] = []  # of the open `traffic()` contexts, the outermost first


@contextlib.contextmanager
def traffic() -> Iterator[list[Launch]]:
    """Watches the kernels interpreted within; yields the list of their launches, which grows with each.

    Raises:
        AccessError: from the launch, wrapped in the interpreter's error; names kernel, argument, offset and line.
    """
    _open.append([])
    try:
        with _watching() if len(_open) == 1 else contextlib.nullcontext():
            yield _open[-1]
    finally:
        _open.pop()


@contextlib.contextmanager
def _watching() -> Iterator[None]:
    from triton.runtime import interpreter

    lists: list[torch.Tensor] = []  # the tensors in list arguments of the running op
    copies: list[weakref.ref] = []  # dense copies of these that its launch made
    run, convert, launch_op = interpreter.GridExecutor.__call__, interpreter._implicit_cvt, Op.launch
    native = interpreter._interpreter
    memory: Any = None  # a _Memory once a kernel runs

    def watched_launch(self, *args):
        lists[:] = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg if isinstance(x, torch.Tensor)]
        copies.clear()
        return launch_op(self, *args)

    def watched_run(self, *args, **options):
        nonlocal memory
        arguments = [*zip(self.arg_names, args), *((k, v) for k, v in options.items() if k in self.arg_names)]
        memory = _Memory(native, interpreter.interpreter_builder, self.fn.__name__, arguments, lists, copies)
        with mock.patch.object(interpreter, "_interpreter", memory):
            run(self, *args, **options)
        for launches in _open:
            launches.append(memory.launch())

    def watched_convert(arg):
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([memory.place(arg)], np.uint64)
        return converted

    with (
        mock.patch.object(Op, "launch", watched_launch),
        mock.patch.object(interpreter.GridExecutor, "__call__", watched_run),
        mock.patch.object(interpreter, "_implicit_cvt", watched_convert),
    ):
        yield


class _Memory:
    """The interpreter's native loads and stores for one launch, in placed addresses."""

    def __init__(self, native, builder, kernel: str, arguments, lists, copies):
        self._native, self._builder, self._launch, self._lists = native, builder, Launch(kernel), lists
        self._waiting: dict[int, list[str]] = {}  # real address -> names of the arguments that begin there
        for name, arg in arguments:
            if hasattr(arg, "data_ptr"):
                self._waiting.setdefault(arg.data_ptr(), []).append(name)
        self._names, self._starts, self._sizes, self._storages = ["no argument"], [0], [0], [(0, 0)]
        self._loaded, self._stored = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._records: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}
        self._copies, self._searched = copies, False
        self._before: dict[int, set[int]] = {}  # program -> those whose accesses came before its own
        self._released: dict[int, set[int]] = {}  # address -> the programs that released it, and those before them

    def __getattr__(self, name):
        return getattr(self._native, name)

    def place(self, tensor) -> int:
        """The address that the kernel sees for a tensor argument."""
        tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.base
        address, span = tensor.data_ptr(), 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
        names = self._waiting.get(address, ["unnamed"])
        self._names.append(names.pop(0) if len(names) > 1 else names[0])
        self._launch.sizes[self._names[-1]] = tensor.numel() * tensor.element_size()
        self._starts.append(address)
        self._sizes.append(span * tensor.element_size() if tensor.numel() else 0)
        self._storages.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        self._loaded, self._stored = (np.append(count, 0) for count in (self._loaded, self._stored))
        return ((len(self._names) - 1) << _SHIFT) + _MIDDLE

    def launch(self) -> Launch:
        for counts, into in ((self._loaded, self._launch.loaded), (self._stored, self._launch.stored)):
            into.update((name, count) for name, count in zip(self._names, counts.tolist()) if count)
        return self._launch

    # ---- called by the interpreter ----

    def load(self, ptrs, mask, other, dtype):
        return self._native.load(self._reach(ptrs, mask, np.dtype(dtype).itemsize, "load"), mask, other, dtype)

    def store(self, ptrs, value, mask):
        return self._native.store(self._reach(ptrs, mask, value.dtype.itemsize, "store"), value, mask)

    def atomic_rmw(self, op, ptrs, value, mask, sem):
        real = self._reach(ptrs, mask, value.dtype.itemsize, "atomic")
        if real.size == 1 and mask.all():
            self._in_order(int(real.flat[0]), sem)
        return self._native.atomic_rmw(op, real, value, mask, sem)

    def atomic_cas(self, ptrs, expected, value, sem):
        mask = np.ones_like(ptrs, dtype=bool)
        return self._native.atomic_cas(self._reach(ptrs, mask, value.dtype.itemsize, "atomic"), expected, value, sem)

    # ---- checks ----

    def _reach(self, ptrs, mask, size: int, kind: str) -> np.ndarray:
        """The real addresses of placed ones, where the mask is set."""
        mask = np.broadcast_to(mask.astype(bool), ptrs.shape)
        live = ptrs[mask]
        slot = (live >> np.uint64(_SHIFT)).astype(np.int64)
        slot[(slot < 0) | (slot >= len(self._names))] = 0
        offset = (live & np.uint64((1 << _SHIFT) - 1)).astype(np.int64) - _MIDDLE
        wrong = (offset < 0) | (offset + size > np.array(self._sizes)[slot])
        real = np.array(self._starts)[slot] + offset
        if wrong.any():
            wrong[wrong] = ~self._in_lists(real[wrong], size)
            if wrong.any():
                at = int(wrong.argmax())
                raise AccessError(self._out_of_bounds(kind, size, int(slot[at]), int(offset[at]), int(wrong.sum())))
        counts = np.bincount(slot, minlength=len(self._names)) * size
        if kind != "store":
            self._loaded += counts
        if kind != "load":
            self._stored += counts
        if kind != "atomic":
            for s in np.flatnonzero(counts):
                self._against_other_programs(kind, int(s), real[slot == s])
        out = ptrs.copy()
        out[mask] = real.astype(np.uint64)
        return out

    def _in_lists(self, real: np.ndarray, size: int) -> np.ndarray:
        """The mask of addresses in a tensor of the op's lists, or in a dense copy that its launch has made of one."""
        inside = _inside(real, size, self._lists) | _inside(real, size, (ref() for ref in self._copies))
        if inside.all() or self._searched or not self._lists:
            return inside
        self._searched, shapes = True, {(x.shape, x.dtype) for x in self._lists}
        # By type: `isinstance` asks every object for its class, which takes several times as long.
        alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and (x.shape, x.dtype) in shapes]
        self._copies[:] = map(weakref.ref, alive)
        return inside | _inside(real, size, alive)

    def _in_order(self, address: int, sem) -> None:
        kinds, me = self._native.MEM_SEMANTIC, self._program() + 1
        before = self._before.setdefault(me, {me})
        if sem == kinds.ACQUIRE:
            before |= self._released.get(address, set())
        elif sem == kinds.RELEASE:
            self._released.setdefault(address, set()).update(before)

    def _against_other_programs(self, kind: str, slot: int, real: np.ndarray) -> None:
        """Raises if a program that is not known to come before wrote these elements or, for a store, read them. The
        record holds, for the first byte of an element, the program that wrote it last and the one that read it (-1:
        several)."""
        start, size = self._storages[slot]
        if start not in self._records:
            self._records[start] = (np.zeros(size, np.int32), np.zeros(size, np.int32)) if size <= _TRACKED else None
        offset = real - start
        record = self._records[start]
        if record is None or offset.min() < 0 or offset.max() >= size:  # too large, or another tensor of a list
            return
        written, read = record
        me = self._program() + 1

        def known(programs: np.ndarray) -> np.ndarray:
            found = programs == 0
            for before in self._before.get(me, {me}):
                found |= programs == before
            return found

        if not known(written[offset]).all():
            raise AccessError(self._race(kind, "writes", slot))
        if kind == "load":
            read[offset] = np.where(known(read[offset]), me, -1)
            return
        if not known(read[offset]).all():
            raise AccessError(self._race(kind, "reads", slot))
        written[offset] = me

    # ---- messages ----

    def _program(self) -> int:
        (x, y, z), (_, by, bz) = self._builder.grid_idx, self._builder.grid_dim
        return (x * by + y) * bz + z

    def _where(self) -> str:
        frame: Any = sys._getframe()
        while frame and (
            "triton/runtime" in frame.f_code.co_filename
            or "triton/language" in frame.f_code.co_filename
            or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        return f"program {self._builder.grid_idx}, {frame.f_code.co_filename}:{frame.f_lineno}"

    def _out_of_bounds(self, kind: str, size: int, slot: int, offset: int, count: int) -> str:
        if slot == 0:
            place = "that belongs to no argument"
        elif offset < 0:
            place = f"{-offset} bytes before {self._names[slot]}"
        else:
            place = f"at byte {offset} of {self._names[slot]}, which has {self._sizes[slot]}"
        return (
            f"{self._launch.kernel}: out-of-bounds {kind} of {size} bytes {place} ({count} elements of this {kind}); "
            f"{self._where()}"
        )

    def _race(self, kind: str, other: str, slot: int) -> str:
        return (
            f"{self._launch.kernel}: {kind} of a place in {self._names[slot]} that another program {other}; "
            f"{self._where()}"
        )


def _inside(real: np.ndarray, size: int, tensors: Iterable[torch.Tensor | None]) -> np.ndarray:
    inside = np.zeros(real.shape, bool)
    for tensor in tensors:
        if tensor is not None and tensor.is_contiguous():
            inside |= (real >= tensor.data_ptr()) & (real + size <= tensor.data_ptr() + tensor.nbytes)
    return inside
