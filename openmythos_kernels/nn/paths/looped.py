"""The reference's loop over a fast block, with the gradients of repeated experts summed in place."""

from __future__ import annotations

from openmythos_kernels.nn.call import LoopCall
from openmythos_kernels.nn.paths.moe_repeated import summing_in_place
from openmythos_kernels.runtime.backends import Choice

WHEN = "with a cache, with frozen positions, or every sequence through every loop"


def choice(recurrent) -> Choice:
    return Choice("pytorch")


def refuses(call: LoopCall) -> str:
    return "" if call.free_shapes else "a compiled, traced or captured graph, or fake tensors"


def run(call: LoopCall):
    with summing_in_place(call):
        return call.module.reference(call)
