"""Everything of a loop but its transformer block as one op: LoRA, injection, halting and the next loop's norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmythos.compat import capturing
from openmythos.config import setting
from openmythos.injection import LTIInjection, ResidualInjection, loop_index_embedding
from openmythos.layers import RMSNorm
from openmythos.recurrence import ACTHalting, ACTState, LoRAAdapter
from openmythos_kernels.nn.call import Call, StepCall
from openmythos_kernels.nn.guards import global_hooks, halt_obstacle, kind_of, obstacle, own_methods, weight_obstacle
from openmythos_kernels.ops.layer import StepWeights
from openmythos_kernels.ops.loop import DTYPES, loop_down, loop_lora_step, loop_step, nothing_runs
from openmythos_kernels.runtime.backends import Choice, choose, unavailable

WHEN = "weights and states of one dtype and device"
# The injections whose whole step the op computes. With others something comes between the block and the halting, and
# what enters is theirs: of them the op computes the halting (`fused_halting`).
WHOLE = {"mythos": LTIInjection, "residual": ResidualInjection}
_PARTS = {"act": ACTHalting, "lora": LoRAAdapter, "norm": RMSNorm}


def choice(block, states: tuple[Tensor, ...] = ()) -> Choice:
    """`states`: h, e and the block's output; without them only the module itself is judged."""
    if reason := _replaced(block):
        return Choice("reference", reason)
    found = choose("loop_step", block.act.halt.weight.device.type)
    if not found.fast:
        return found
    reason = _dtypes(block, states)
    if found.backend == "triton" and block.act.halt.weight.dtype == torch.float64 and not reason:
        if not unavailable("loop_step", "cuda", "cuda"):
            return Choice("cuda", "the triton kernels take no float64")
        reason = "the triton kernels take no float64"
    return Choice("reference", reason) if reason else found


def refuses(call: StepCall) -> str:
    if not is_whole(call.module):
        return f'injection="{setting(call.module.cfg, "injection")}"'
    found = choice(call.module, call.states)
    return "" if found.fast else found.reason


def run(call: StepCall) -> tuple[Tensor, ACTState | None, Tensor | None]:
    block, h, e, f, state, t = call.module, call.h, call.e, call.f, call.state, call.t
    residual = setting(block.cfg, "injection") == "residual"
    f, lora = (f - call.u if residual else f), _lora(call, inside=not residual)
    op: Any = loop_step if len(lora) == 1 else loop_lora_step
    act, (lora_B, step) = state is not None, weights(block)
    spends = spends_remainder(call)
    if not act or spends:  # what would halt decides nothing: no gradient, not one of zeros
        step = step._replace(halt_weight=step.halt_weight.detach(), halt_bias=step.halt_bias.detach())
    state = nothing_runs(h) if state is None else state
    out = op(
        h,
        e,
        f,
        *lora,
        *(state.h_out, state.cumulative_p, state.running, state.ponder),
        lora_B,
        *step,
        embedding(call, t + 1),
        loop=t,
        threshold=float(block.cfg.act_threshold),
        spend_remainder=spends,
        enter=not call.last,
        eps=block.norm.eps,
    )
    after = ACTState(out.h_out, out.cumulative_p, out.running, out.ponder) if act else None
    return out.h, after, None if call.last else out.u


def spends_remainder(call: StepCall) -> bool:
    """Whether running positions give this loop's state all the weight that is left, whatever their probability."""
    return call.last and setting(call.module.cfg, "act_remainder") == "last"


def is_whole(block) -> bool:
    """Whether the op computes the whole step of this block's injection."""
    return setting(block.cfg, "injection") in WHOLE


def weights(block) -> tuple[Tensor, StepWeights]:
    """The LoRA's up-projection (rank, D), of rank 0 without LoRA, and the step's other parameters."""
    injection, halt, weight = block.injection, block.act.halt, block.norm.weight
    lora_B = weight.new_empty(0, weight.shape[0]) if block.lora is None else block.lora.B
    return lora_B, StepWeights(
        log_A=injection.log_A,
        log_dt=injection.log_dt,
        B=injection.B,
        halt_weight=halt.weight,
        halt_bias=halt.bias,
        norm_weight=weight,
    )


def embedding(call: Call, t: int) -> Tensor:
    """The embedding of loop t for the state of a call; kept where that is safe."""
    h = call.x
    if not call.runs_now:
        return loop_index_embedding(t, h.shape[-1] // 8, h.device, h.dtype)  # symbolic or fake: not to be kept
    return kept_embedding(t, h.shape[-1] // 8, h.device, h.dtype)


def kept_embedding(t: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The embedding of loop t, (size,): a dozen small ops, so it is kept."""
    key = (t, size, device, dtype)
    if key not in _embeddings:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward later
            made = loop_index_embedding(t, size, device, dtype)
        if capturing(device):
            return made  # filled when the graph is replayed, and its memory is the graph's
        _embeddings[key] = made
    return _embeddings[key]


# Never thrown away: CUDA graphs read them at every replay.
_embeddings: dict[tuple, Tensor] = {}


def _lora(call: StepCall, inside: bool) -> tuple[Tensor, ...]:
    """The LoRA's down-projection and scale, where the op may apply them and is to (`inside`).

    Else its coordinates of f, (B, T, rank) in h's dtype; rank 0 without LoRA.
    """
    block, h, f, t = call.module, call.h, call.f, call.t
    lora, device = block.lora, call.device
    if lora is None:
        return (h.new_empty(*h.shape[:-1], 0),)
    scale = None if call.autocast else _scale(lora, t)
    if scale is not None and inside and choose("loop_lora_step", device).fast:
        return lora.down.weight, scale
    if scale is not None and choose("loop_down", device).fast:
        return (loop_down(f, lora.down.weight) * scale,)
    return (lora.hidden(f, t).to(h.dtype),)  # under autocast in another dtype


def _scale(lora, t: int) -> Tensor | None:
    """The LoRA's scale in loop t, (rank,), if ops may stand in for the LoRA's down-projection."""
    scale = lora._modules["scale"]
    if obstacle("down", lora._modules["down"], nn.Linear) or obstacle("scale", scale, nn.Embedding):
        return None
    return scale._parameters["weight"][min(t, scale.num_embeddings - 1)]


def _replaced(block) -> str:
    """Why the op must not stand in for this module's parts; empty when it may."""
    injection, halting = setting(block.cfg, "injection"), setting(block.cfg, "halting")
    whole = WHOLE.get(injection)
    if not whole and halting == "off":
        return f'halting="{halting}" with injection="{injection}" has no fused step'
    if reason := global_hooks() or own_methods("this block", block, kind_of(block), called=True):
        return reason
    for name, kind in ({"injection": whole, **_PARTS} if whole else {"act": ACTHalting}).items():
        part = block._modules.get(name)
        if part is not None and (reason := obstacle(name, part, kind)):  # None: no LoRA
            return reason
    if reason := halt_obstacle(block._modules["act"]):
        return reason
    return _weights_replaced(block) if whole else ""


def _weights_replaced(block) -> str:
    """Why parameters that no part of its own is called for must not be read; empty when they may."""
    injection, lora = block._modules["injection"], block._modules.get("lora")
    for name in ("log_A", "log_dt", "B"):
        if reason := weight_obstacle(name, injection._parameters.get(name), 1):
            return reason
    if lora is None:
        return ""
    reason = obstacle("lora's scale", lora._modules["scale"], nn.Embedding)
    return reason or weight_obstacle("lora's B", lora._parameters.get("B"), 2)


def _dtypes(block, states: tuple[Tensor, ...]) -> str:
    """Why the op cannot compute with plain parts' weights and these states; empty when it can."""
    halt = block.act.halt.weight
    dtype, device = halt.dtype, halt.device
    if dtype not in DTYPES:
        return f"weights of {dtype}"
    tensors = [halt, block.act.halt.bias, *states]
    if is_whole(block):
        lora_B, step = weights(block)
        tensors += [lora_B, *step]
    if any(x.dtype != dtype for x in tensors):
        return "weights and states have different dtypes"
    if any(x.device != device for x in tensors):
        return "weights and states are on different devices"
    return ""
