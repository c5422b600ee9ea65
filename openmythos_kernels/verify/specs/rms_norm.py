"""The specification of `rms_norm`."""

from __future__ import annotations

from openmythos.variants import VARIANTS
from openmythos_kernels.ops.norm import formula
from openmythos_kernels.ops.norm.rms_norm import add_rms_norm, rms_norm
from openmythos_kernels.verify.specification import Inputs, Outputs, Sizes, Specification, drawer


def _make(sizes: Sizes, dtype, device, generator) -> Inputs:
    shape, draw = (sizes["tokens"], sizes["dim"]), drawer(dtype, device, generator)
    x = draw(*shape, scale=sizes.get("scale", 1.0))
    return dict(x=x, add=draw(*shape) if sizes["adds"] else None, weight=draw(shape[1]))


def _fast(x, add, weight) -> Outputs:
    if add is None:
        return {"norm": rms_norm(x, weight)}
    return dict(zip(("sum", "norm"), add_rms_norm(x, add, weight)))


def _reference(x, add, weight) -> Outputs:
    total, norm, _ = formula.rms_norm(x, add, weight, 1e-6)
    return {"norm": norm} if add is None else {"sum": total, "norm": norm}


SPECIFICATIONS = [
    Specification(
        name="rms_norm",
        backends=("cpu", "triton"),
        make=_make,
        fast=_fast,
        reference=_reference,
        differentiable=("x", "add", "weight"),
        cases={
            "sum": dict(tokens=7, dim=48, adds=True),
            "alone": dict(tokens=5, dim=64, adds=False),
            "primes": dict(tokens=13, dim=97, adds=True),
            "width one": dict(tokens=3, dim=1, adds=True),
            "one token": dict(tokens=1, dim=130, adds=True),
            "no token": dict(tokens=0, dim=24, adds=True),
            "several row blocks": dict(tokens=77, dim=24, adds=True),
            "very wide": dict(tokens=2, dim=8200, adds=True),
            "tiny values": dict(tokens=4, dim=40, adds=False, scale=1e-3),
        },
        ranges=dict(tokens=(0, 90), dim=(1, 200)),
        shipped={name: dict(tokens=4096, dim=cfg().dim, adds=True) for name, cfg in VARIANTS.items()},
    )
]
