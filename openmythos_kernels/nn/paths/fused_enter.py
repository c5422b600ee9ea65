"""What the block reads in a loop, its input's norm included, as one op."""

from __future__ import annotations

from torch import Tensor

from openmythos_kernels.nn.call import EnterCall
from openmythos_kernels.nn.paths import fused_step
from openmythos_kernels.ops.loop import inject_norm
from openmythos_kernels.runtime.backends import Choice

WHEN = "the first loop; others where the step did not make it"


def choice(block) -> Choice:
    return fused_step.choice(block) if fused_step.is_whole(block) else Choice("reference", "another injection")


def refuses(call: EnterCall) -> str:
    if not fused_step.is_whole(call.module):
        return "another injection"
    found = fused_step.choice(call.module, call.states)
    return "" if found.fast else found.reason


def run(call: EnterCall) -> Tensor:
    norm = call.module.norm
    return inject_norm(call.h, call.e, norm.weight, fused_step.embedding(call, call.t), norm.eps)
