"""Specifications of `moe_route` and `moe_sort`."""

from __future__ import annotations

import torch

from openmythos_kernels.ops.moe import formula
from openmythos_kernels.ops.moe import sort as sorting
from openmythos_kernels.ops.moe.route import moe_route
from openmythos_kernels.ops.moe.sort import Order, moe_sort
from openmythos_kernels.verify.specification import Specification

_CASES = {
    "several": dict(tokens=19, experts=6, k=2),
    "no token": dict(tokens=0, experts=8, k=2),
    "one token": dict(tokens=1, experts=64, k=4),
    "primes": dict(tokens=7, experts=5, k=3),
    "k = 1": dict(tokens=67, experts=4, k=1),
    "k = experts": dict(tokens=33, experts=13, k=13),
    "one expert": dict(tokens=5, experts=1, k=1),
}
_RANGES = {"tokens": (0, 80), "experts": (5, 60), "k": (1, 5)}
_SHIPPED = {  # the published variants' experts
    "1b": dict(tokens=4096, experts=64, k=4),
    "10b": dict(tokens=4096, experts=128, k=4),
    "500b": dict(tokens=4096, experts=512, k=8),
}


def _make_route(sizes, dtype, device, generator):
    """Sums without ties, whose order is undefined, and exact in every dtype: eighths below 32."""
    shape = (sizes["tokens"], sizes["experts"])
    if device.type == "meta":
        logits, bias = torch.empty(shape, device=device), torch.empty(shape[1:], device=device)
    else:
        sums = torch.rand(shape, generator=generator, device=device).argsort(-1) - shape[1] // 2
        bias = torch.randint(-3, 4, shape[1:], generator=generator, device=device) / 8
        logits = sums / 8 - bias
    return dict(logits=logits.to(dtype), bias=bias.to(dtype), k=sizes["k"])


def _reference_route(logits, bias, k):
    topk_weights, expert_idx, load = formula.route(logits, bias, k)
    return dict(expert_idx=expert_idx, topk_weights=topk_weights, load=load)


def _make_sort(sizes, dtype, device, generator):
    shape = (sizes["tokens"], sizes["k"])
    if device.type == "meta":
        expert_idx = torch.empty(shape, dtype=torch.int64, device=device)
    else:  # with duplicates, empty experts, and indices out of range
        expert_idx = torch.randint(-1, sizes["experts"] + 1, shape, generator=generator, device=device)
    return dict(expert_idx=expert_idx, experts=sizes["experts"], block=sizes.get("block", 16))


SPECIFICATIONS = [
    Specification(
        name="moe_route",
        backends=("cpu", "triton"),
        make=_make_route,
        fast=lambda **inputs: dict(zip(("expert_idx", "topk_weights", "load"), moe_route(**inputs))),
        reference=_reference_route,
        differentiable=("logits",),
        exact=("expert_idx", "load"),
        cases=_CASES,
        ranges=_RANGES,
        shipped=_SHIPPED,
    ),
    Specification(
        name="moe_sort",
        backends=("triton",),
        make=_make_sort,
        fast=lambda **inputs: moe_sort(**inputs)._asdict(),
        reference=lambda **inputs: Order(*sorting._plain(**inputs))._asdict(),
        differentiable=(),
        exact=Order._fields,
        cases=_CASES | {"tiles of 64": dict(tokens=300, experts=3, k=2, block=64)},
        ranges=_RANGES,
        shipped={name: sizes | dict(block=64) for name, sizes in _SHIPPED.items()},
        dtypes=(torch.float32,),
    ),
]
