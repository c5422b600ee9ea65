"""Halting by the op, for injections that add nothing behind the block; the other parts of a step are called."""

from __future__ import annotations

from torch import Tensor

from openmythos.recurrence import ACTState
from openmythos_kernels.nn.call import StepCall
from openmythos_kernels.nn.paths import fused_step
from openmythos_kernels.ops.loop import act_update
from openmythos_kernels.runtime.backends import Choice

WHEN = "ACT with an injection that has no fused step"


def choice(block) -> Choice:
    if fused_step.is_whole(block):
        return Choice("reference", "the whole step is fused")
    return fused_step.choice(block)


def refuses(call: StepCall) -> str:
    if call.f is None or fused_step.is_whole(call.module):
        return "the whole step is fused"
    if call.state is None:
        return "nothing halts, or an exit rule decides"
    found = fused_step.choice(call.module, call.states)
    return "" if found.fast else found.reason


def run(call: StepCall) -> tuple[Tensor, ACTState, Tensor | None]:
    block, h, e, u, f, t = call.module, call.h, call.e, call.u, call.f, call.t
    new = block.injection.update(h, e, u, f if block.lora is None else f + block.lora(f, t)).to(h.dtype)
    weight, bias, threshold = block.act.halt.weight, block.act.halt.bias, float(block.cfg.act_threshold)
    if spends := fused_step.spends_remainder(call):  # halting decides nothing: no gradient, not one of zeros
        weight, bias = weight.detach(), bias.detach()
    before: ACTState = call.state
    state = act_update(new, *before, weight, bias, t, threshold, spends)
    return new, state, None if call.last else block.enter(new, e, t + 1)
