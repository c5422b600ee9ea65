"""Specifications of the compaction ops."""

from __future__ import annotations

import torch

from openmythos_kernels.ops.loop.compaction import (
    _plain_compact,
    _plain_gather,
    _plain_scatter,
    compact_active,
    gather_rows,
    scatter_rows,
)
from openmythos_kernels.verify.specification import Specification, drawer

_CASES = {
    "some run": dict(B=3, T=41, D=24, running="some"),
    "none runs": dict(B=2, T=7, D=8, running="none"),
    "all run": dict(B=2, T=7, D=9, running="all"),
    "one position": dict(B=1, T=1, D=1, running="all"),
    "no sequence": dict(B=0, T=5, D=4, running="some"),
    "no position": dict(B=3, T=0, D=4, running="some"),
    "several tiles": dict(B=2, T=1031, D=3, running="some"),
}
_RANGES = {"B": (0, 4), "T": (0, 50), "D": (1, 40)}
_SHIPPED = {"8 x 1024 of width 2048": dict(B=8, T=1024, D=2048, running="some")}


def _running(sizes, device, generator):
    shape = (sizes["B"], sizes["T"])
    if generator is None:
        return torch.empty(shape, dtype=torch.bool, device=device)
    if sizes["running"] != "some":
        return torch.full(shape, sizes["running"] == "all", device=device)
    return torch.rand(shape, device=device, generator=generator) < 0.6


def _make_compact(sizes, dtype, device, generator):
    return {"running": _running(sizes, device, generator)}


def _make_gather(sizes, dtype, device, generator):
    running = _running(sizes, device, generator)
    index = torch.empty(running.numel(), dtype=torch.int64, device=device)
    if index.device.type != "meta":
        index = _plain_compact(running)[0]
    return {"x": drawer(dtype, device, generator)(running.numel(), sizes["D"]), "index": index}


def _make_scatter(sizes, dtype, device, generator):
    made = _make_gather(sizes, dtype, device, generator)
    base = made.pop("x")
    return {"base": base, "rows": drawer(dtype, device, generator)(*base.shape), **made}


def _hostile_gather(inputs):
    """NaN in the rows that are not gathered."""
    x, kept = torch.full_like(inputs["x"], float("nan")), inputs["index"][inputs["index"] >= 0]
    x[kept] = inputs["x"][kept]
    return {**inputs, "x": x}


def _hostile_scatter(inputs):
    """NaN in dropped rows of `rows`, and in rows of `base` that are overwritten."""
    base, rows, index = inputs["base"].clone(), inputs["rows"].clone(), inputs["index"]
    rows[index < 0], base[index[index >= 0]] = float("nan"), float("nan")
    return {**inputs, "base": base, "rows": rows}


def _named(active):
    return dict(zip(("index", "last", "counts", "total"), active))


SPECIFICATIONS = [
    Specification(
        name="compact_active",
        backends=("cpu", "cuda"),
        make=_make_compact,
        fast=lambda running: _named(compact_active(running)),
        reference=lambda running: _named(_plain_compact(running)),
        differentiable=(),
        exact=("index", "last", "counts", "total"),
        cases=_CASES,
        ranges=_RANGES,
        shipped=_SHIPPED,
        dtypes=(torch.float32,),
    ),
    Specification(
        name="gather_rows",
        backends=("cpu", "cuda"),
        make=_make_gather,
        fast=lambda x, index: {"out": gather_rows(x, index)},
        reference=lambda x, index: {"out": _plain_gather(x, index)},
        differentiable=("x",),
        cases=_CASES,
        ranges=_RANGES,
        shipped=_SHIPPED,
        hostile=_hostile_gather,
    ),
    Specification(
        name="scatter_rows",
        backends=("cpu", "cuda"),
        make=_make_scatter,
        fast=lambda base, rows, index: {"out": scatter_rows(base, rows, index)},
        reference=lambda base, rows, index: {"out": _plain_scatter(base, rows, index, base.shape[0])},
        differentiable=("base", "rows"),
        cases=_CASES,
        ranges=_RANGES,
        shipped=_SHIPPED,
        hostile=_hostile_scatter,
    ),
]
