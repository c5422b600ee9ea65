"""The specification of `loop_down`."""

from __future__ import annotations

from openmythos_kernels.ops.loop import formula
from openmythos_kernels.ops.loop.down import loop_down
from openmythos_kernels.verify.specification import Inputs, Sizes, Specification, drawer


def _make(sizes: Sizes, dtype, device, generator) -> Inputs:
    draw = drawer(dtype, device, generator)
    return dict(
        f=draw(sizes["tokens"], sizes["dim"]), down=draw(sizes["rank"], sizes["dim"], scale=sizes["dim"] ** -0.5)
    )


SPECIFICATION = Specification(
    name="loop_down",
    backends=("cpu",),
    make=_make,
    fast=lambda f, down: {"lora_hidden": loop_down(f, down)},
    reference=lambda f, down: {"lora_hidden": formula.down(f, down)},
    differentiable=("f", "down"),
    cases={
        "plain": dict(tokens=37, dim=64, rank=8),
        "primes": dict(tokens=13, dim=97, rank=5),
        "one position": dict(tokens=1, dim=31, rank=1),
        "width one": dict(tokens=5, dim=1, rank=3),
        "no position": dict(tokens=0, dim=24, rank=2),
    },
    ranges=dict(tokens=(0, 60), dim=(1, 200), rank=(1, 20)),
)
