"""What the block reads in a loop with Parcae's injection, `a * h + dt * e`, as one op: the loop step's update of no
block output, at the injection's rates.

PyTorch makes three passes of it and seven of its backward, on states that are as wide as the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmythos.config import setting
from openmythos.injection import ParcaeInjection
from openmythos_kernels.nn.call import EnterCall
from openmythos_kernels.nn.guards import global_hooks, kind_of, obstacle, own_methods, weight_obstacle
from openmythos_kernels.ops.loop import lti_update
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "every loop, eager, states of float32 or float64"


def choice(block) -> Choice:
    if setting(block.cfg, "injection") != "parcae":
        return Choice("reference", "another injection")
    injection = block._modules.get("injection")
    reason = global_hooks() or own_methods("this block", block, kind_of(block), called=True)
    if reason := reason or obstacle("injection", injection, ParcaeInjection):
        return Choice("reference", reason)
    for name in ("A_log", "dt_bias"):
        if reason := weight_obstacle(name, injection._parameters.get(name), 1):
            return Choice("reference", reason)
    found = choose("loop_step", injection._parameters["A_log"].device.type)
    if found.fast and found.backend != "cpu":
        return Choice("reference", "not measured on a GPU")
    return found


def refuses(call: EnterCall) -> str:
    found = choice(call.module)
    if not found.fast:
        return found.reason
    if not call.runs_now:
        return "traced or transformed"  # a compiler fuses these passes with their neighbours
    rates = [call.module.injection.A_log, call.module.injection.dt_bias]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in rates) else torch.float32
    if not call.h.dtype == call.e.dtype == wide:
        return f"states of {call.h.dtype} and {call.e.dtype} with rates of {wide}"
    if any(x.device != call.h.device for x in (call.e, *rates)):
        return "weights and states are on different devices"
    return ""


def run(call: EnterCall) -> Tensor:
    log_rate, dt = call.module.injection.rates()
    return lti_update(call.h, call.e, torch.zeros_like(call.h), log_rate, log_rate.new_zeros(1), dt)
